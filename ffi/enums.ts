// The enums of packhorse.h, by the words that TypeScript has for their values.

/** `ph_dtype` */
export const DTYPE = { f16: 0, bf16: 1, f32: 2, i32: 3, u8: 4, f64: 5 } as const;
/** `ph_kv_quantizer` */
export const KV_QUANTIZER = { packkv: 0, kivi: 1 } as const;
/** `ph_kv_grouping` */
export const KV_GROUPING = { token: 0, head: 1 } as const;
/** `ph_kv_repack` */
export const KV_REPACK = { none: 0, median: 1, greedy: 2, auto: 3 } as const;
/** `ph_kv_part` */
export const KV_PART = { keys: 0, values: 1 } as const;
/** `ph_kv_cache_quantizer` */
export const KV_CACHE_QUANTIZER = { packkv: 0, fixed: 1, raw16: 2, kivi: 3 } as const;
/** `ph_ot_cost` */
export const OT_COST = { sqeuclidean: 0, euclidean: 1, cosine: 2, dot: 3 } as const;
/** `ph_ot_gradient` */
export const OT_GRADIENT = { implicit: 0, envelope: 1, unrolled: 2, detached: 3 } as const;
/** `ph_ot_status`, in the order of its values. */
export const OT_STATUSES = [
  "converged",
  "iteration-limit",
  "infeasible",
  "non-finite-cost",
  "non-finite-point",
  "invalid-mass",
  "non-finite-distance",
  "asymmetric-distance",
] as const;
/** `ph_graph_activation` */
export const GRAPH_ACTIVATION = {
  relu: 0,
  leaky_relu: 1,
  gelu: 2,
  tanh: 3,
  sigmoid: 4,
  softplus: 5,
} as const;
