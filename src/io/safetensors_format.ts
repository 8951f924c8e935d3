/*
 * The safetensors format (https://github.com/huggingface/safetensors), the part that reader and writer share.
 *
 *   file = u64 header byte length, header, data
 *   header = JSON {"__metadata__": {string: string}, name: {"dtype", "shape", "data_offsets": [begin, end]}},
 *            padded with spaces by writers; offsets count from the start of the data, little-endian
 *
 * The tensors' ranges cover the data without gaps or overlaps.
 */
import { BYTES_PER_ELEMENT, type DType } from "../dtype.ts";

/** What a safetensors file says of a tensor. */
export interface TensorInfo {
  /** Unique in the file. */
  readonly name: string;
  /** Type of its elements. */
  readonly dtype: DType;
  /** Sizes, outermost first; `[]` is a scalar. */
  readonly shape: readonly number[];
  /** Bytes of its data: the product of the sizes times the bytes of an element. */
  readonly byteLength: number;
}

/** The bytes of the header length that a file begins with. */
export const LENGTH_BYTES = 8;
/** The official readers' limit. */
export const MOST_HEADER_BYTES = 100_000_000;
/** The entry of a header that is no tensor. */
export const METADATA = "__metadata__";

/** The format's word for a type: "F16" for f16. */
export function dtypeWord(dtype: DType): string {
  return dtype.toUpperCase();
}

/** The type a word of the format stands for, if Packhorse has it. */
export function dtypeOfWord(word: string): DType | undefined {
  return (Object.keys(BYTES_PER_ELEMENT) as DType[]).find((dtype) => dtypeWord(dtype) === word);
}
