import type { KvCacheStep } from "../kv/cache_step.ts";
import type { KvStepGraph } from "../kv/step_graph.ts";

/** More than the shapes that a batch goes through between two of its members ending. */
const MOST_GRAPHS = 32;
const MOST_SEEN = 1024;

/**
 * Decode steps as CUDA graphs, one for every shape of step: a shape that comes the second time is captured, for some come
 * but once; the graphs that were used last are kept.
 */
export class DecodeGraphs implements Disposable {
  readonly #graphs = new Map<string, KvStepGraph>();
  readonly #seen = new Set<string>();

  /** Enqueues what `enqueue` does for a step, by itself or by the graph of an earlier step of the same shape. */
  run(step: KvCacheStep, enqueue: () => void): void {
    const { shape } = step;
    const known = this.#graphs.get(shape);
    if (known === undefined && !this.#seen.has(shape)) {
      if (this.#seen.size >= MOST_SEEN) this.#seen.clear();
      this.#seen.add(shape);
      enqueue();
      return;
    }
    const graph = known ?? step.capture(enqueue);
    this.#graphs.delete(shape);
    this.#graphs.set(shape, graph); // the latest last
    if (this.#graphs.size > MOST_GRAPHS) {
      const [[oldest, dropped]] = this.#graphs as Iterable<[string, KvStepGraph]> as [
        [string, KvStepGraph],
      ];
      this.#graphs.delete(oldest);
      dropped[Symbol.dispose]();
    }
    step.replay(graph);
  }

  /** Frees the graphs. */
  [Symbol.dispose](): void {
    for (const graph of this.#graphs.values()) graph[Symbol.dispose]();
    this.#graphs.clear();
    this.#seen.clear();
  }
}
