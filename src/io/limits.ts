/** Deno's node:fs and node:zlib wrap or refuse lengths of 2 GiB and more: longer ones go in pieces. */
export const MOST_BYTES_PER_CALL = 2 ** 30;
