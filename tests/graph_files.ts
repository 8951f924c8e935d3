/** Files of arrays, as NumPy writes them. */
import { crc32, deflateRawSync } from "node:zlib";

/** A .npy file of 64-bit integers or float64. */
export function npyFile(
  values: number[],
  shape: number[],
  descr: "<i8" | "<f8",
): Uint8Array<ArrayBuffer> {
  const size = shape.length === 1 ? `${shape[0]},` : shape.join(", ");
  const header = `{'descr': '${descr}', 'fortran_order': False, 'shape': (${size}), }\n`;
  const data = descr === "<i8"
    ? new Uint8Array(BigInt64Array.from(values, BigInt).buffer)
    : new Uint8Array(Float64Array.from(values).buffer);
  const encode = (text: string) => new TextEncoder().encode(text);
  const length = [header.length & 255, header.length >> 8];
  return Uint8Array.of(0x93, ...encode("NUMPY"), 1, 0, ...length, ...encode(header), ...data);
}

/** A .npz file; every second member is deflated. */
export function npzFile(files: Record<string, Uint8Array<ArrayBuffer>>): Uint8Array<ArrayBuffer> {
  const parts: number[] = [];
  const directory: number[] = [];
  const u16 = (value: number) => [value & 255, value >> 8];
  const u32 = (value: number) => [...u16(value & 0xffff), ...u16(value >>> 16)];
  Object.entries(files).forEach(([name, data], index) => {
    const method = index % 2 === 0 ? 0 : 8;
    const packed = method === 0 ? data : deflateRawSync(data);
    const text = [...new TextEncoder().encode(name)];
    const common = [
      ...[...u16(20), ...u16(0), ...u16(method), ...u32(0)],
      ...[...u32(crc32(data)), ...u32(packed.length), ...u32(data.length)],
      ...[...u16(text.length), ...u16(0)],
    ];
    const start = parts.length;
    parts.push(...u32(0x04034b50), ...common, ...text, ...packed);
    directory.push(
      ...[...u32(0x02014b50), ...u16(20), ...common, ...u16(0), ...u16(0), ...u16(0), ...u32(0)],
      ...[...u32(start), ...text],
    );
  });
  const count = Object.keys(files).length;
  return Uint8Array.of(
    ...parts,
    ...directory,
    ...[...u32(0x06054b50), ...u16(0), ...u16(0), ...u16(count), ...u16(count)],
    ...[...u32(directory.length), ...u32(parts.length), ...u16(0)],
  );
}
