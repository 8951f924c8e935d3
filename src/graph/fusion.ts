import type { TransportSolution } from "../ot/mod.ts";
import type { DeviceBatch, DeviceView } from "./device_batch.ts";
import { type LayerContext, Readout, type ReadoutKind } from "./layers.ts";
import { concatenate } from "./operations.ts";
import type { Tape, Tensor } from "./tape.ts";

/** A view whose nodes are embedded. */
export interface EncodedView {
  readonly view: DeviceView;
  /** `[nodes, width]`. */
  readonly nodes: Tensor;
}

/** What a fusion makes of the views. */
export interface FusedViews {
  /** One row for each object, `[objects, width]`. */
  readonly embedding: Tensor;
  /** What is added to the loss, `[1, 1]`. */
  readonly penalty?: Tensor | undefined;
  /** What it cost to transport nodes of views to each other, on average, if they were: `[1, 1]`. */
  readonly transportCost?: Tensor | undefined;
  /** How they were transported. */
  readonly transports?: readonly ViewTransport[] | undefined;
}

/** The correspondence of the nodes of two views, of the objects that have nodes in both. */
export interface ViewTransport {
  /** The views of the plans' rows and columns. */
  readonly views: readonly [number, number];
  /** Where in the batch the objects are, one for each problem of the solution. */
  readonly objects: readonly number[];
  /** It lives as long as the tensors of the step. */
  readonly solution: TransportSolution;
}

/**
 * How the embeddings of an object's views become one. It may compare nodes across views, change them by each other's, and
 * add to the loss; parameters of its own it adds when it is made.
 */
export interface Fusion {
  /** Columns of the embedding. */
  readonly width: number;
  fuse(tape: Tape, views: readonly EncodedView[], batch: DeviceBatch): FusedViews;
}

/** Reads out every view by itself, and puts the results side by side. */
export class LateFusion implements Fusion {
  readonly width: number;
  readonly #readouts: readonly Readout[];

  constructor(
    { parameters, name }: LayerContext,
    options: { readonly views: number; readonly width: number; readonly readout: ReadoutKind },
  ) {
    const { views, width, readout: kind } = options;
    this.width = views * width;
    this.#readouts = Array.from(
      { length: views },
      (_, i) => new Readout({ parameters, name: `${name}.${i}` }, { kind, width }),
    );
  }

  fuse(tape: Tape, views: readonly EncodedView[]): FusedViews {
    const [first, ...others] = views.map(({ view, nodes }, i) =>
      this.#readouts[i]!.forward(tape, nodes, view)
    );
    return { embedding: others.length === 0 ? first! : concatenate(tape, [first!, ...others]) };
  }
}
