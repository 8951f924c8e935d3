import { PackhorseError } from "../src/error.ts";
import { call, create } from "./call.ts";
import { HeldBuffers, type NativeDevice, type NativeResource } from "./device.ts";
import type { NativeKvCache } from "./kv_cache.ts";

/**
 * A `ph_kv_cache_graph`, freed before its device closes. The buffers that the captured work uses keep their memory
 * until then, also when they are closed before.
 */
export class NativeKvCacheGraph implements NativeResource {
  readonly device: NativeDevice;
  readonly #deviceHandle: Deno.PointerObject;
  readonly #handle: Deno.PointerObject;
  readonly #buffers: HeldBuffers;
  #isClosed = false;

  /** Captures what `enqueue` enqueues on the cache's device, of which nothing runs. */
  static capture(cache: NativeKvCache, enqueue: () => void): NativeKvCacheGraph {
    const { device } = cache;
    const { ph_kv_cache_capture_begin, ph_kv_cache_capture_end } = device.library.symbols;
    device.requireNoCalls("capture a step");
    call(ph_kv_cache_capture_begin, device.handle, cache.handle);
    const buffers = device.captured = new HeldBuffers();
    // Throws `disposed` if the cache was closed meanwhile, which has ended the capture.
    const end = () => {
      device.captured = undefined;
      try {
        return create(ph_kv_cache_capture_end, device.handle, cache.handle);
      } catch (error) {
        buffers.release();
        throw error;
      }
    };
    try {
      enqueue();
    } catch (error) {
      try {
        new NativeKvCacheGraph(device, end(), buffers).close();
      } catch {
        // What went wrong first is what matters; the capture is over in any case.
      }
      throw error;
    }
    return new NativeKvCacheGraph(device, end(), buffers);
  }

  private constructor(device: NativeDevice, handle: Deno.PointerObject, buffers: HeldBuffers) {
    this.device = device;
    this.#deviceHandle = device.handle;
    this.#handle = handle;
    this.#buffers = buffers;
    device.own(this);
  }

  /** The `ph_kv_cache_graph*`. Throws `disposed` once closed, as it is with its device. */
  get handle(): Deno.PointerObject {
    if (!this.#isClosed) return this.#handle;
    const message = "Cannot use the graph of a step: it, or its device, was disposed";
    throw new PackhorseError("disposed", message);
  }

  get isClosed(): boolean {
    return this.#isClosed;
  }

  /** Frees the graph. Does nothing the second time. */
  close(): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    this.device.disown(this);
    const { ph_kv_cache_graph_destroy } = this.device.library.symbols;
    call(ph_kv_cache_graph_destroy, this.#deviceHandle, this.#handle);
    this.#buffers.release();
  }
}
