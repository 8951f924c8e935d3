/**
 * Optimal transport on ragged batches: many problems of any sizes at once, without padding, each with its own status, and
 * gradients.
 *
 * @module
 */
export { type DivergenceOptions, SinkhornDivergence, sinkhornDivergence } from "./divergence.ts";
export { type ExactOptions, exactTransport } from "./exact.ts";
export {
  type GromovOptions,
  type GromovProblem,
  type GromovReport,
  GromovSolution,
  gromovTransport,
} from "./gromov.ts";
export { type PartialOptions, partialSinkhorn } from "./partial.ts";
export type {
  LinearProblem,
  Masses,
  PointCost,
  PointProblem,
  TransportArray,
  TransportDType,
  TransportProblem,
} from "./problem.ts";
export { type ProximalOptions, proximalTransport } from "./proximal.ts";
export { sinkhorn, type SinkhornOptions } from "./sinkhorn.ts";
export {
  type ApplyOptions,
  type BackwardOptions,
  type GradientMode,
  type ProblemGradients,
  type SolutionGradients,
  type TransportReport,
  TransportSolution,
  type TransportStatus,
} from "./solution.ts";
