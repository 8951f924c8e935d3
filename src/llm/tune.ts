import { PackhorseError } from "../error.ts";
import {
  type CodecEvaluation,
  evaluateModel,
  type EvaluationOptions,
  type ReferenceEvaluation,
} from "./evaluate.ts";
import { encodePrompt, type Prompt } from "./generate.ts";
import type { ModelParts } from "./language_model.ts";
import { RAW16 } from "./window_cache.ts";

/** Options of {@linkcode LanguageModel.tune}. */
export interface TuningOptions extends Omit<EvaluationOptions, "codecs"> {
  /** Most codecs to measure. Default: 40. */
  readonly budget?: number | undefined;
  /** Called with the codecs that are measured, parts of them included, and the most there may be. */
  readonly onProgress?: ((done: number, total: number) => void) | undefined;
}

/** What {@linkcode LanguageModel.tune} finds. */
export interface Tuning {
  /** The divergence that is allowed. */
  readonly maxKld: number;
  /** Of what was measured, the codec with the fewest bits per value that holds; `raw16` if no other does. */
  readonly best: CodecEvaluation & { readonly name: string };
  /** All that was measured, and `raw16`; the fewest bits first. */
  readonly measured: readonly (CodecEvaluation & { readonly name: string })[];
  /** Whether the budget ended the search. */
  readonly isCut: boolean;
  /** With a 16-bit cache. */
  readonly reference: ReferenceEvaluation;
}

/** A search for a codec: gives texts that name codecs, and takes what each of them costs. */
type Search<Result = void> = Generator<string, Result, CodecEvaluation>;

const BUDGET = 40;

/** {@linkcode LanguageModel.tune}. */
export async function tuneCodec(
  parts: ModelParts,
  { text, maxKld }: { readonly text: Prompt; readonly maxKld: number },
  options: TuningOptions,
): Promise<Tuning> {
  const { budget = BUDGET, onProgress, ...evaluation } = options;
  if (!(maxKld >= 0 && maxKld < Infinity)) refuse(`maxKld must be 0 or more, got ${maxKld}`);
  if (!(Number.isSafeInteger(budget) && budget >= 1)) {
    refuse(`budget must be an integer of 1 or more, got ${budget}`);
  }
  const ids = encodePrompt(parts, text, false);
  let reference: ReferenceEvaluation | undefined;
  const measured = new Map<string, CodecEvaluation & { name: string }>();
  const measure = async (names: readonly string[]) => {
    const done = measured.size;
    const found = await evaluateModel(parts, ids, {
      ...evaluation,
      codecs: names,
      onProgress: (part, all) => onProgress?.(done + names.length * part / all, budget),
    });
    reference ??= found.reference;
    found.results.forEach((result, i) => measured.set(names[i]!, { ...result, name: names[i]! }));
  };

  // Nothing that loses anything diverges by 0.
  const searches = maxKld === 0
    ? []
    : [searchScales(maxKld), searchBits("fixed", maxKld), searchBits("kivi", maxKld)];
  // All go on together, so that what they have in common is computed once a round.
  let active = searches.map((search) => ({ search, asked: search.next() }));
  while (true) {
    for (const each of active) {
      let known: CodecEvaluation | undefined;
      while (!each.asked.done && (known = measured.get(each.asked.value)) !== undefined) {
        each.asked = each.search.next(known);
      }
    }
    active = active.filter(({ asked }) => !asked.done);
    const names = [...new Set(active.map(({ asked }) => asked.value as string))];
    const left = names.slice(0, budget - measured.size);
    if (left.length === 0) break;
    await measure(left);
  }
  if (reference === undefined) await measure([]);
  measured.set("raw16", {
    ...{ codec: RAW16, name: "raw16", bitsPerValue: 16, kld: 0, top1: 1 },
    ...{ perplexity: reference!.perplexity, perplexityIncrease: 0, scores: undefined },
  });
  const sorted = [...measured.values()].sort((a, b) =>
    a.bitsPerValue - b.bitsPerValue || a.kld - b.kld
  );
  return {
    maxKld,
    best: sorted.find(({ kld }) => kld <= maxKld)!,
    measured: sorted,
    isCut: active.length > 0,
    reference: reference!,
  };
}

const MOST_BITS = 8;

/**
 * Bits of a quantizer: bisects those that keys and values have alike, as divergence falls with them, then takes bits from
 * either part alone.
 */
function* searchBits(quantizer: "fixed" | "kivi", maxKld: number): Search {
  const codec = (k: number, v: number) => `${quantizer}:k=${k},v=${v}`;
  let [failing, holding] = [0, MOST_BITS + 1];
  while (holding - failing > 1) {
    const bits = Math.floor((failing + holding) / 2);
    if ((yield codec(bits, bits)).kld <= maxKld) holding = bits;
    else failing = bits;
  }
  if (holding > MOST_BITS) return;
  for (let k = holding - 1; k >= 1; k--) {
    if ((yield codec(k, holding)).kld > maxKld) break;
  }
  for (let v = holding - 1; v >= 1; v--) {
    if ((yield codec(holding, v)).kld > maxKld) break;
  }
}

const [LEAST_SCALE, MOST_SCALE] = [1 / 254, 1];
/** The geometric mean of the scales where the search begins, and by what factor the values' is the larger. */
const [FIRST_SCALE, FIRST_RATIO] = [Math.SQRT2 / 10, 2];
/** About how divergence grows with the scales: by this power. */
const POWER = 2;
/** A scale is good enough that reaches this share of the divergence that is allowed. */
const ENOUGH = 0.92;
/** What is aimed at, so that half of the tries do not fail by a hair. */
const AIM = 0.96;
/** By less than this factor, scales make no difference worth a measurement: 0.03 bits. */
const NEAR = 1.02;
/** Below this, a divergence is noise. */
const NO_DIVERGENCE = 1e-9;

/** The scales of packkv: finds the largest with the usual ratio, then a better ratio, then the largest with that. */
function* searchScales(maxKld: number): Search {
  const first = yield* largestScale(FIRST_SCALE, { ratio: FIRST_RATIO, maxKld });
  if (first === undefined) return;
  let best = { ratio: FIRST_RATIO, merit: merit(first.result) };
  for (const factor of [1 / 2, 2]) {
    for (let ratio = FIRST_RATIO * factor; ratio >= 1 / 16 && ratio <= 16; ratio *= factor) {
      const found = { ratio, merit: merit(yield scales(first.scale, ratio)) };
      if (found.merit >= best.merit) break;
      best = found;
    }
    if (best.ratio !== FIRST_RATIO) break; // better this way, so worse the other way
  }
  if (best.ratio === FIRST_RATIO) return;
  yield* largestScale(first.scale, { ratio: best.ratio, maxKld });
}

/** Bits that a codec would take if its scales were changed until it diverged by 1: a factor of 2 takes a bit. */
function merit({ bitsPerValue, kld }: CodecEvaluation): number {
  return bitsPerValue + Math.log2(Math.max(kld, NO_DIVERGENCE)) / POWER;
}

/**
 * The largest scales of a ratio that hold. Divergence grows with them, about as a power: so a first guess is scaled, and
 * from when the answer is between two, a line through both, in logarithms, tells the next.
 */
function* largestScale(
  guess: number,
  { ratio, maxKld }: { ratio: number; maxKld: number },
): Search<{ scale: number; result: CodecEvaluation } | undefined> {
  const spread = Math.sqrt(Math.max(ratio, 1 / ratio));
  // The larger of the two reaches the end first, and from there on both stay.
  const [least, most] = [LEAST_SCALE * spread, MOST_SCALE / spread];
  const aim = Math.log(AIM * maxKld);
  let holding: { scale: number; result: CodecEvaluation } | undefined;
  let failing: { scale: number; result: CodecEvaluation } | undefined;
  const at = ({ scale, result }: { scale: number; result: CodecEvaluation }) => ({
    x: Math.log(scale),
    y: Math.log(Math.max(result.kld, NO_DIVERGENCE)),
  });
  let scale = Math.min(Math.max(guess, least), most);
  while (true) {
    const result = yield scales(scale, ratio);
    if (result.kld <= maxKld) holding = { scale, result };
    else failing = { scale, result };
    if (holding !== undefined) {
      const isMost = holding.scale >= most / NEAR;
      const isClose = failing !== undefined && failing.scale / holding.scale < NEAR;
      if (isMost || isClose || holding.result.kld >= ENOUGH * maxKld) return holding;
    } else if (failing !== undefined && failing.scale <= least * NEAR) return undefined;
    let x: number;
    if (holding === undefined || failing === undefined) {
      const one = at((holding ?? failing)!);
      x = one.x + (aim - one.y) / POWER;
    } else {
      const [low, high] = [at(holding), at(failing)];
      const share = (aim - low.y) / (high.y - low.y);
      // Away from the ends, so that every try narrows what is left.
      x = low.x + (high.x - low.x) * Math.min(0.85, Math.max(0.15, share));
    }
    scale = Math.min(Math.max(Math.exp(x), least), most);
  }
}

/** The codec whose scales have this geometric mean and ratio, to three digits. */
function scales(scale: number, ratio: number): string {
  const part = (value: number) =>
    Number(Math.min(Math.max(value, LEAST_SCALE), MOST_SCALE).toPrecision(3));
  return `packkv:k=${part(scale / Math.sqrt(ratio))},v=${part(scale * Math.sqrt(ratio))}`;
}

function refuse(reason: string): never {
  throw new PackhorseError("invalid-argument", `Cannot tune the codec: ${reason}`);
}
