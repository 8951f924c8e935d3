/** A signal that Ctrl-C aborts, so that a command can end without leaving half a file behind. */
export function listenForInterrupt(): { readonly signal: AbortSignal } & Disposable {
  const controller = new AbortController();
  const listener = onInterrupt(() => controller.abort(new Error("interrupted")));
  return { signal: controller.signal, [Symbol.dispose]: () => listener[Symbol.dispose]() };
}

/** Calls `handle` at every Ctrl-C, which then does not end the program, until the result is disposed. */
export function onInterrupt(handle: () => void): Disposable {
  Deno.addSignalListener("SIGINT", handle);
  return { [Symbol.dispose]: () => Deno.removeSignalListener("SIGINT", handle) };
}
