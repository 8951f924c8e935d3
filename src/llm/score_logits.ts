/**
 * How good logits are, on a device. As the functions of `operations.ts`, these only enqueue, allocate nothing and may be
 * captured; they throw `invalid-argument` for a buffer of another device, type or length, and `disposed`.
 *
 * @module
 */
import * as native from "../../ffi/llm.ts";
import type { DeviceBuffer } from "../device/device_buffer.ts";
import { Call, type FloatBuffer } from "./operation_call.ts";
import type { LogitsOptions } from "./operations.ts";

/**
 * `out[row]` is how surprising the token `targets[row]` is, `log(sum(exp(logits[row]))) - logits[row, target]`, in nats:
 * the exponential of the mean is the perplexity. `logits` are `[rows, vocabulary]`, `targets` and `out` `[rows]`. NaN for a
 * target that is no token.
 */
export function crossEntropy(
  logits: FloatBuffer,
  targets: DeviceBuffer<"i32">,
  out: DeviceBuffer<"f32">,
  { rows, vocabulary }: LogitsOptions,
): void {
  const call = new Call("crossEntropy", logits.device, { rows, vocabulary });
  native.crossEntropy(call.device, {
    logits: { ...call.floats({ logits }, [rows, vocabulary]), rows, vocabulary },
    targets: call.integers({ targets }, [rows]),
    out: call.written(call.floats({ out }, [rows], ["f32"])),
  });
}

/**
 * `out[row]` is the Kullback-Leibler divergence of the probabilities of `logits[row]` from those of `reference[row]`,
 * `sum(p * log(p / q))` for `p` of the reference, in nats, and then 1 if both have their largest logit at the same index,
 * else 0. `reference` and `logits` are `[rows, vocabulary]`, `out` is `[rows, 2]`. The divergence is right to about 1e-7.
 */
export function divergence(
  reference: FloatBuffer,
  logits: FloatBuffer,
  out: DeviceBuffer<"f32">,
  { rows, vocabulary }: LogitsOptions,
): void {
  const call = new Call("divergence", logits.device, { rows, vocabulary });
  native.divergence(call.device, {
    reference: { ...call.floats({ reference }, [rows, vocabulary]), rows, vocabulary },
    logits: call.floats({ logits }, [rows, vocabulary]),
    out: call.written(call.floats({ out }, [rows, 2], ["f32"])),
  });
}
