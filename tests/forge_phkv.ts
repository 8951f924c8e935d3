import { crc32 } from "node:zlib";

/** Where the parts of a `.phkv` header lie, by what its prefix says. */
function partsOf(file: Uint8Array) {
  const view = new DataView(file.buffer, file.byteOffset, file.byteLength);
  const headerEnd = Number(view.getBigUint64(16, true));
  const jsonEnd = 32 + view.getUint32(24, true);
  return { headerEnd, jsonEnd, tableStart: Math.ceil(jsonEnd / 8) * 8 };
}

/** The JSON of a valid `.phkv` file. */
export function phkvJson(file: Uint8Array): string {
  return new TextDecoder().decode(file.subarray(32, partsOf(file).jsonEnd));
}

/** A valid `.phkv` file with another JSON in both headers, with a valid checksum. */
export function withPhkvJson(file: Uint8Array, json: string): Uint8Array<ArrayBuffer> {
  const { headerEnd, tableStart } = partsOf(file);
  const text = new TextEncoder().encode(json);
  const newTableStart = 32 + Math.ceil(text.byteLength / 8) * 8;
  const header = new Uint8Array(newTableStart + headerEnd - tableStart);
  header.set(file.subarray(0, 32));
  header.set(text, 32);
  header.set(file.subarray(tableStart, headerEnd), newTableStart);
  const view = new DataView(header.buffer);
  view.setBigUint64(16, BigInt(header.byteLength), true);
  view.setUint32(24, text.byteLength, true);
  view.setBigUint64(header.byteLength - 16, BigInt(header.byteLength), true);
  const result = new Uint8Array(file.byteLength + 2 * (header.byteLength - headerEnd));
  result.set(header);
  result.set(file.subarray(headerEnd, -headerEnd), header.byteLength);
  seal(result, header.byteLength);
  return result;
}

/** A `.phkv` file with other bytes in its header, of the same length, and with a valid checksum. */
export function withPhkvHeader(
  file: Uint8Array,
  edit: (header: DataView) => void,
): Uint8Array<ArrayBuffer> {
  const { headerEnd } = partsOf(file);
  const result = Uint8Array.from(file);
  edit(new DataView(result.buffer, 0, headerEnd));
  seal(result, headerEnd);
  return result;
}

/**
 * A valid `.phkv` file with another content of one of its entries, which `edit` changes in place or returns, and with
 * valid checksums.
 */
export function withPhkvEntry(
  file: Uint8Array,
  entry: number,
  edit: (content: DataView<ArrayBuffer>) => Uint8Array | void,
): Uint8Array<ArrayBuffer> {
  const { headerEnd, tableStart } = partsOf(file);
  const header = Uint8Array.from(file.subarray(0, headerEnd));
  const table = new DataView(header.buffer, tableStart);
  let begin = headerEnd;
  for (let i = 0; i < entry; i++) begin += Number(table.getBigUint64(16 * i, true));
  const end = begin + Number(table.getBigUint64(16 * entry, true));
  const content = Uint8Array.from(file.subarray(begin, end));
  const edited = edit(new DataView(content.buffer)) ?? content;
  table.setBigUint64(16 * entry, BigInt(edited.byteLength), true);
  table.setUint32(16 * entry + 8, crc32(edited), true);
  const result = new Uint8Array(file.byteLength + edited.byteLength - content.byteLength);
  result.set(header);
  result.set(file.subarray(headerEnd, begin), headerEnd);
  result.set(edited, begin);
  result.set(file.subarray(end), begin + edited.byteLength);
  seal(result, headerEnd);
  return result;
}

/** Entries in the table of a valid `.phkv` file. */
export function phkvEntries(file: Uint8Array): number {
  const { headerEnd, tableStart } = partsOf(file);
  return (headerEnd - 16 - tableStart) / 16;
}

/** Gives the first `headerBytes` bytes of `file` a valid checksum, and copies them to its end. */
function seal(file: Uint8Array<ArrayBuffer>, headerBytes: number): void {
  const view = new DataView(file.buffer);
  view.setUint32(12, 0, true);
  view.setUint32(12, crc32(file.subarray(0, headerBytes)), true);
  file.copyWithin(file.byteLength - headerBytes, 0, headerBytes);
}
