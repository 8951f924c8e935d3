import { PackhorseError } from "../error.ts";

/** How the learning rate changes over the epochs. */
export interface LearningRateSchedule {
  /**
   * `constant`; `cosine`: down to 0 along half a wave (Loshchilov and Hutter, arXiv 1608.03983); `step`: times `factor`
   * every `every` epochs. Default: constant.
   */
  readonly kind?: "constant" | "cosine" | "step" | undefined;
  /** Epochs over which the rate grows to its full height first. Default: 0. */
  readonly warmup?: number | undefined;
  /** Of `step`. Default: 20. */
  readonly every?: number | undefined;
  /** Of `step`. Default: 0.5. */
  readonly factor?: number | undefined;
}

/** The share of the learning rate that an epoch, counted from 0, has. Throws `invalid-argument` for a schedule that is none. */
export function learningRateShare(
  schedule: LearningRateSchedule,
  epoch: number,
  epochs: number,
): number {
  const { kind = "constant", warmup = 0, every = 20, factor = 0.5 } = schedule;
  if (!(warmup >= 0 && every >= 1 && factor > 0)) {
    const message = "Cannot follow a schedule: warmup must be 0 or more, every 1 or more, " +
      `factor above 0, got ${warmup}, ${every} and ${factor}`;
    throw new PackhorseError("invalid-argument", message);
  }
  if (epoch < warmup) return (epoch + 1) / (warmup + 1);
  const done = epoch - warmup;
  switch (kind) {
    case "constant":
      return 1;
    case "cosine":
      return (1 + Math.cos(Math.PI * done / Math.max(1, epochs - warmup))) / 2;
    case "step":
      return factor ** Math.floor(done / every);
    default:
      throw new PackhorseError("invalid-argument", `Cannot follow a schedule of kind ${kind}`);
  }
}
