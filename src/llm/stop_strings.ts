/**
 * Finds where a text that comes in pieces contains one of several strings. What may be the beginning of one is held
 * back until it is clear that it is not.
 */
export class StopStrings {
  readonly #strings: readonly string[];
  #held = "";

  /** Empty strings never stop. */
  constructor(strings: readonly string[]) {
    this.#strings = strings.filter((each) => each.length > 0);
  }

  /** What of the text can be shown now, up to the first of the strings, and whether there is one. */
  push(piece: string): { readonly text: string; readonly stopped: boolean } {
    const all = this.#held + piece;
    const ends = this.#strings.map((each) => all.indexOf(each)).filter((at) => at >= 0);
    if (ends.length > 0) {
      this.#held = "";
      return { text: all.slice(0, Math.min(...ends)), stopped: true };
    }
    const held = Math.max(0, ...this.#strings.map((each) => overlap(all, each)));
    this.#held = all.slice(all.length - held);
    return { text: all.slice(0, all.length - held), stopped: false };
  }

  /** What is held back, once the text is over. */
  flush(): string {
    const held = this.#held;
    this.#held = "";
    return held;
  }
}

/** The length of the longest end of `text` that `string` begins with, but is not. */
function overlap(text: string, string: string): number {
  for (let length = Math.min(text.length, string.length - 1); length > 0; length--) {
    if (text.endsWith(string.slice(0, length))) return length;
  }
  return 0;
}
