/** Options of a {@linkcode ValidationError}. */
export interface ValidationErrorOptions extends ErrorOptions {
  /** Exit code of the process, 2 unless given. */
  exitCode?: number;
}

/** The user called a command wrongly. */
export class ValidationError extends Error {
  override readonly name = "ValidationError";
  /** Exit code of the process. */
  readonly exitCode: number;

  constructor(message: string, { exitCode = 2, ...options }: ValidationErrorOptions = {}) {
    super(message, options);
    this.exitCode = exitCode;
  }
}
