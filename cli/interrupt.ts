/** A signal that Ctrl-C aborts, so that a command can end without leaving half a file behind. */
export function listenForInterrupt(): { readonly signal: AbortSignal } & Disposable {
  const controller = new AbortController();
  const abort = () => controller.abort(new Error("interrupted"));
  Deno.addSignalListener("SIGINT", abort);
  return {
    signal: controller.signal,
    [Symbol.dispose]: () => Deno.removeSignalListener("SIGINT", abort),
  };
}
