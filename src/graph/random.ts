/** Random numbers that follow from a seed alone, the same on every machine: sfc32, seeded by SplitMix32. */
export class Random {
  #state: [number, number, number, number];

  /** Streams of the same seed are independent: {@linkcode Random} of 7 and "shuffle", 3 for the shuffle of epoch 3. */
  constructor(seed: number, ...stream: (number | string)[]) {
    let hash = mix(seed >>> 0, Math.floor(seed / 2 ** 32) >>> 0);
    for (const part of stream) {
      for (const word of typeof part === "number" ? [part >>> 0] : new TextEncoder().encode(part)) {
        hash = mix(hash, word);
      }
    }
    this.#state = [mix(hash, 1), mix(hash, 2), mix(hash, 3), 1];
    for (let i = 0; i < 12; i++) this.word();
  }

  /** An integer from 0 to 2^32 - 1. */
  word(): number {
    const [a, b, c, count] = this.#state;
    const sum = (a + b + count) >>> 0;
    const turned = (c << 21) | (c >>> 11);
    this.#state = [b ^ (b >>> 9), (c + (c << 3)) | 0, (turned + sum) | 0, (count + 1) | 0];
    return sum;
  }

  /** A number from 0 to below 1. */
  uniform(): number {
    return this.word() / 2 ** 32;
  }

  /** An integer from 0 to below `bound`. */
  below(bound: number): number {
    return Math.floor(this.uniform() * bound);
  }

  /** A number of the standard normal distribution, by Box and Muller. */
  gaussian(): number {
    const radius = Math.sqrt(-2 * Math.log(1 - this.uniform()));
    return radius * Math.cos(2 * Math.PI * this.uniform());
  }

  /** The elements in an order of equal chance. */
  shuffled<T>(elements: readonly T[]): T[] {
    const order = [...elements];
    for (let i = order.length - 1; i > 0; i--) {
      const other = this.below(i + 1);
      [order[i], order[other]] = [order[other]!, order[i]!];
    }
    return order;
  }
}

function mix(hash: number, word: number): number {
  let z = (Math.imul(hash ^ word, 0x9e3779b1) + 0x9e3779b9) | 0;
  z = Math.imul(z ^ (z >>> 16), 0x21f0aaad);
  z = Math.imul(z ^ (z >>> 15), 0x735a2d97);
  return (z ^ (z >>> 15)) >>> 0;
}
