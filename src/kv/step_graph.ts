import { NativeKvCacheGraph } from "../../ffi/kv_cache_graph.ts";
import type { NativeKvCache } from "../../ffi/kv_cache.ts";
import { PackhorseError } from "../error.ts";

/** Frees graphs that were dropped without being disposed. */
const dropped = new FinalizationRegistry<NativeKvCacheGraph>((native) => native.close());

/** Captures what `enqueue` enqueues for the current step of a cache, which has this shape. */
export let captureGraph: (
  cache: NativeKvCache,
  shape: string,
  enqueue: () => void,
) => KvStepGraph;

/** The native side of a graph. Throws `disposed`. */
export let nativeOfGraph: (graph: KvStepGraph) => NativeKvCacheGraph;

/**
 * The work of a step, captured by {@linkcode KvCacheStep.capture} as a CUDA graph, to run again in later steps of the
 * same shape by {@linkcode KvCacheStep.replay}.
 *
 * It holds where its buffers are, and keeps their memory until it is disposed, even if they are disposed before. Memory
 * that is not Packhorse's ({@linkcode DeviceBuffer.fromAddress}) has to stay on its own.
 */
export class KvStepGraph implements Disposable {
  /** The {@linkcode KvCacheStep.shape} of the steps that it is good for. */
  readonly shape: string;
  readonly #native: NativeKvCacheGraph;

  private constructor(native: NativeKvCacheGraph, shape: string) {
    this.#native = native;
    this.shape = shape;
    dropped.register(this, native, this);
  }

  static {
    captureGraph = (cache, shape, enqueue) => {
      const native = NativeKvCacheGraph.capture(cache, () => {
        const result: unknown = enqueue();
        if (!(result instanceof Promise)) return;
        result.catch(() => {}); // it fails once the capture is over, which is said here
        const message = "Cannot capture an asynchronous function: it must enqueue and return";
        throw new PackhorseError("invalid-argument", message);
      });
      return new KvStepGraph(native, shape);
    };
    nativeOfGraph = (graph) => {
      void graph.#native.handle; // throws once disposed
      return graph.#native;
    };
  }

  /** Whether it, or its device, was disposed. */
  get isDisposed(): boolean {
    return this.#native.isClosed;
  }

  /** Frees the graph, once work of it that is enqueued is done. Does nothing the second time. */
  [Symbol.dispose](): void {
    dropped.unregister(this);
    this.#native.close();
  }
}
