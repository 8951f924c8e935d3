import { PackhorseError } from "../src/error.ts";
import { call, create } from "./call.ts";
import type { HostBytes, NativeDevice } from "./device.ts";
import { OT_OPTIONS, OT_REPORT } from "./structs.ts";
import { type NativeTensor, placeIf } from "./tensor.ts";

// The functions of packhorse.h, section "ot". What tensors are and hold is for the caller to check.

/** Options of a whole batch, as `ph_ot_options` has them, and those that problems have of their own. */
export interface NativeTransportOptions {
  readonly values: { readonly [Name in keyof typeof OT_OPTIONS.fields]: number };
  readonly epsilons: Float64Array<ArrayBuffer> | undefined;
  readonly tolerances: Float64Array<ArrayBuffer> | undefined;
  readonly iterations: Int32Array<ArrayBuffer> | undefined;
}

/** The tensors of a problem: `cost`, or `x` and `y`. */
export interface NativeTransportInputs {
  readonly cost?: NativeTensor | undefined;
  readonly x?: NativeTensor | undefined;
  readonly y?: NativeTensor | undefined;
  readonly a?: NativeTensor | undefined;
  readonly b?: NativeTensor | undefined;
}

export interface NativeSolution {
  readonly warmG: NativeTensor | undefined;
  readonly f: NativeTensor;
  readonly g: NativeTensor;
  readonly plan: NativeTensor | undefined;
  readonly reports: NativeTensor;
}

/** What plans are computed from. */
export interface NativePotentials {
  readonly f: NativeTensor;
  readonly g: NativeTensor;
  readonly plan?: NativeTensor | undefined;
  readonly reports: NativeTensor;
}

export interface NativePlanProduct {
  readonly matrix: NativeTensor;
  readonly out: NativeTensor;
  readonly width: number;
  readonly transposed: boolean;
  readonly normalised: boolean;
}

/** Gradients by what they are of. */
export interface NativeTransportGradients {
  readonly mode: number;
  readonly warmG: NativeTensor | undefined;
  readonly of: {
    readonly plan?: NativeTensor | undefined;
    readonly f?: NativeTensor | undefined;
    readonly g?: NativeTensor | undefined;
    readonly cost?: NativeTensor | undefined;
    readonly value?: NativeTensor | undefined;
  };
  readonly to: NativeTransportInputs;
}

/** What `ph_ot_report`s say; a loop of its own, as batches have thousands. */
export function readReports(
  { buffer, byteOffset, byteLength }: HostBytes,
): ReturnType<typeof OT_REPORT.read>[] {
  const view = new DataView(buffer, byteOffset, byteLength);
  const [size, status, iterations, place, marginalError, cost, value, epsilon] = OT_REPORT
    .layout as [number, number, number, number, number, number, number, number];
  return Array.from({ length: byteLength / size }, (_, i) => ({
    status: view.getUint32(i * size + status, true),
    iterations: view.getUint32(i * size + iterations, true),
    place: Number(view.getBigUint64(i * size + place, true)),
    marginal_error: view.getFloat64(i * size + marginalError, true),
    cost: view.getFloat64(i * size + cost, true),
    value: view.getFloat64(i * size + value, true),
    epsilon: view.getFloat64(i * size + epsilon, true),
  }));
}

/** A `ph_ot_batch`, freed before its device closes. */
export class NativeTransportBatch {
  readonly device: NativeDevice;
  readonly #handle: Deno.PointerObject;
  readonly #deviceHandle: Deno.PointerObject;
  #isClosed = false;

  constructor(
    device: NativeDevice,
    { rows, columns, dtype, dimension, streaming, backward }: {
      readonly rows: Uint32Array<ArrayBuffer>;
      readonly columns: Uint32Array<ArrayBuffer>;
      readonly dtype: number;
      readonly dimension: number;
      readonly streaming: boolean;
      readonly backward: boolean;
    },
  ) {
    this.device = device;
    this.#deviceHandle = device.handle;
    this.#handle = create(
      device.library.symbols.ph_ot_batch_create,
      device.handle,
      rows.length,
      rows,
      columns,
      dtype,
      dimension,
      streaming ? 1 : 0,
      backward ? 1 : 0,
    );
    device.own(this);
  }

  /** The `ph_ot_batch*`. Throws `disposed` once closed, as it is with its device. */
  get handle(): Deno.PointerObject {
    if (!this.#isClosed) return this.#handle;
    const message = "Cannot use the transport problems: they, or their device, were disposed";
    throw new PackhorseError("disposed", message);
  }

  set({ values, epsilons, tolerances, iterations }: NativeTransportOptions): void {
    const options: HostBytes = OT_OPTIONS.write(values);
    call(
      this.device.library.symbols.ph_ot_batch_set,
      this.device.handle,
      this.handle,
      options,
      epsilons ?? null,
      tolerances ?? null,
      iterations ?? null,
    );
  }

  bind({ cost, x, y, a, b }: NativeTransportInputs): void {
    call(
      this.device.library.symbols.ph_ot_batch_bind,
      this.device.handle,
      this.handle,
      ...placeIf(cost),
      ...placeIf(x),
      ...placeIf(y),
      ...placeIf(a),
      ...placeIf(b),
    );
  }

  sinkhorn({ warmG, f, g, plan, reports }: NativeSolution): void {
    call(
      this.device.library.symbols.ph_ot_sinkhorn,
      this.device.handle,
      this.handle,
      ...placeIf(warmG),
      ...placeIf(f),
      ...placeIf(g),
      ...placeIf(plan),
      ...placeIf(reports),
    );
  }

  /** Solves exactly; `masses` are those to transport, of each problem, if not all. */
  exact(
    { f, g, plan, reports }: Omit<NativeSolution, "warmG">,
    masses: Float64Array<ArrayBuffer> | undefined,
  ): void {
    call(
      this.device.library.symbols.ph_ot_exact,
      this.device.handle,
      this.handle,
      masses ?? null,
      ...placeIf(f),
      ...placeIf(g),
      ...placeIf(plan),
      ...placeIf(reports),
    );
  }

  /** Transports `masses` of each problem, with entropy. */
  partial(
    { f, g, plan, reports }: Omit<NativeSolution, "warmG">,
    masses: Float64Array<ArrayBuffer>,
  ): void {
    call(
      this.device.library.symbols.ph_ot_partial,
      this.device.handle,
      this.handle,
      masses,
      ...placeIf(f),
      ...placeIf(g),
      ...placeIf(plan),
      ...placeIf(reports),
    );
  }

  /** Takes proximal points of `inner` iterations each. */
  proximal({ f, g, plan, reports }: Omit<NativeSolution, "warmG">, inner: number): void {
    call(
      this.device.library.symbols.ph_ot_proximal,
      this.device.handle,
      this.handle,
      inner,
      ...placeIf(f),
      ...placeIf(g),
      ...placeIf(plan),
      ...placeIf(reports),
    );
  }

  /** Solves Gromov-Wasserstein transport of the distances x and y. */
  gromov(
    { x, y, cost, a, b }: NativeTransportInputs,
    { alphas, plan, reports }: {
      readonly alphas: Float64Array<ArrayBuffer>;
      readonly plan: NativeTensor;
      readonly reports: NativeTensor;
    },
  ): void {
    call(
      this.device.library.symbols.ph_ot_gromov,
      this.device.handle,
      this.handle,
      alphas,
      ...placeIf(x),
      ...placeIf(y),
      ...placeIf(cost),
      ...placeIf(a),
      ...placeIf(b),
      ...placeIf(plan),
      ...placeIf(reports),
    );
  }

  writePlan({ f, g, reports }: NativePotentials, plan: NativeTensor): void {
    call(
      this.device.library.symbols.ph_ot_plan,
      this.device.handle,
      this.handle,
      ...placeIf(f),
      ...placeIf(g),
      ...placeIf(reports),
      ...placeIf(plan),
    );
  }

  multiply({ f, g, plan, reports }: NativePotentials, product: NativePlanProduct): void {
    const { matrix, out, width, transposed, normalised } = product;
    call(
      this.device.library.symbols.ph_ot_plan_product,
      this.device.handle,
      this.handle,
      ...placeIf(f),
      ...placeIf(g),
      ...placeIf(plan),
      ...placeIf(reports),
      ...placeIf(matrix),
      ...placeIf(out),
      width,
      transposed ? 1 : 0,
      normalised ? 1 : 0,
    );
  }

  backward(
    { f, g, plan, reports }: NativePotentials,
    { mode, warmG, of, to }: NativeTransportGradients,
  ): void {
    call(
      this.device.library.symbols.ph_ot_backward,
      this.device.handle,
      this.handle,
      mode,
      ...placeIf(f),
      ...placeIf(g),
      ...placeIf(plan),
      ...placeIf(reports),
      ...placeIf(warmG),
      ...placeIf(of.plan),
      ...placeIf(of.f),
      ...placeIf(of.g),
      ...placeIf(of.cost),
      ...placeIf(of.value),
      ...placeIf(to.cost),
      ...placeIf(to.x),
      ...placeIf(to.y),
      ...placeIf(to.a),
      ...placeIf(to.b),
    );
  }

  /** Frees the batch. Does nothing the second time. */
  close(): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    this.device.disown(this);
    call(this.device.library.symbols.ph_ot_batch_destroy, this.#deviceHandle, this.#handle);
  }
}
