/**
 * Work that must not overlap: calls that wait for the device without blocking are in flight meanwhile, and a step cannot be
 * captured then.
 */
export class Turns {
  #last: Promise<unknown> = Promise.resolve();

  /** Does `work` once all that was given before is done. */
  take<T>(work: () => Promise<T>): Promise<T> {
    const turn = this.#last.then(work);
    this.#last = turn.catch(() => {});
    return turn;
  }
}
