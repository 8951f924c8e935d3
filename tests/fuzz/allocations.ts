/** Records the largest array that code asks for by its length while this lasts, in bytes. */
export class AllocationWatch implements Disposable {
  /** Bytes of the largest array since the last reset. */
  largest = 0;
  readonly #originals = { Uint8Array, Uint32Array, BigUint64Array, Float64Array };

  constructor() {
    for (const [name, original] of Object.entries(this.#originals)) {
      const watched = new Proxy(original, {
        construct: (target, parameters, newTarget) => {
          if (typeof parameters[0] === "number") {
            this.largest = Math.max(this.largest, parameters[0] * target.BYTES_PER_ELEMENT);
          }
          return Reflect.construct(target, parameters, newTarget);
        },
      });
      Object.assign(globalThis, { [name]: watched });
    }
  }

  [Symbol.dispose](): void {
    Object.assign(globalThis, this.#originals);
  }
}
