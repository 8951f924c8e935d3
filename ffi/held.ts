/** What keeps its native memory while asynchronous calls use it, also when it is closed meanwhile. */
export class Held {
  readonly #destroy: () => void;
  #holds = 0;
  #isClosed = false;

  /** `destroy` frees the memory, once. */
  constructor(destroy: () => void) {
    this.#destroy = destroy;
  }

  get isClosed(): boolean {
    return this.#isClosed;
  }

  /** Keeps the memory until {@linkcode release}, also when it is closed meanwhile. */
  hold(): void {
    this.#holds++;
  }

  release(): void {
    this.#holds--;
    if (this.#isClosed && this.#holds === 0) this.#destroy();
  }

  /** Frees the memory, or lets the last {@linkcode release} do so. Does nothing the second time. */
  close(): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    if (this.#holds === 0) this.#destroy();
  }
}
