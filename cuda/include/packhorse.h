/*
 * Packhorse: the C ABI.
 *
 * libpackhorse_cpu.so and libpackhorse_cuda.so export exactly these symbols.
 *
 * Conventions
 * - A function returns 0 (PH_OK) or one of the ph_status codes; a function that creates a handle returns
 *   it, or NULL on failure with the code in *status. On failure the message stands in `error`
 *   (NUL-terminated, cut at error_bytes), a buffer of the call: nothing is kept per thread, so calls may
 *   come from any thread.
 * - Work on a device is enqueued on its one stream in call order, its own or one of the caller's.
 *   ph_device_synchronize waits for it. On the CPU the work is done when the call returns. Only the functions
 *   that say so wait.
 * - A region of device memory is a ph_buffer and a byte offset. Offsets of tensors must be multiples of 16.
 * - Multi-byte values are little-endian. A shape [a, b, c] is row-major, c contiguous.
 * - Structs are checked once, at load, by ph_layout.
 */
#ifndef PACKHORSE_H
#define PACKHORSE_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define PH_API __attribute__((visibility("default")))
#else
#define PH_API
#endif

/* Changes with every incompatible change of a symbol, a struct or a code. */
#define PH_ABI_VERSION 3u

enum ph_status {
  PH_OK = 0,
  PH_ERROR_INVALID_ARGUMENT = 1, /* a value outside its documented range */
  PH_ERROR_UNSUPPORTED = 2,      /* a valid request that this backend or GPU cannot serve */
  PH_ERROR_OUT_OF_MEMORY = 3,
  PH_ERROR_CORRUPT = 4, /* bytes that no encoder writes */
  PH_ERROR_NO_GPU = 5,
  PH_ERROR_CUDA = 6,
  PH_ERROR_INTERNAL = 7,
  PH_ERROR_NON_FINITE = 8 /* a NaN or an infinity where there must be none */
};

enum ph_dtype { PH_F16 = 0, PH_BF16 = 1, PH_F32 = 2, PH_I32 = 3, PH_U8 = 4, PH_F64 = 5 };

/* ---- library ------------------------------------------------------------------------------------- */

/* PH_ABI_VERSION of the loaded library. */
PH_API uint32_t ph_abi_version(void);

/* Writes the layout of one struct as u32 words: sizeof, then offsetof each field in declaration order.
 * Returns the number of words, or 0 for an unknown struct; writes at most `capacity` words. */
enum ph_struct {
  PH_STRUCT_DEVICE_INFO = 0,
  PH_STRUCT_KV_CODEC = 1,
  PH_STRUCT_KV_STATISTICS = 2,
  PH_STRUCT_KV_CACHE_CONFIG = 3,
  PH_STRUCT_KV_CACHE_CODEC = 4,
  PH_STRUCT_KV_CACHE_STATISTICS = 5,
  PH_STRUCT_LLM_SAMPLER = 6,
  PH_STRUCT_OT_REPORT = 7,
  PH_STRUCT_OT_OPTIONS = 8,
  PH_STRUCT_OT_GROMOV_REPORT = 9
};
PH_API uint32_t ph_layout(uint32_t which, uint32_t* words, uint32_t capacity);

/* ---- device -------------------------------------------------------------------------------------- */

typedef struct ph_device ph_device;
typedef struct ph_buffer ph_buffer;

typedef struct ph_device_info {
  char name[128];           /* "NVIDIA H200", or the CPU's model name */
  char instruction_set[32]; /* "sm_90", or "avx512vnni", "avx512", "avx2", "baseline" */
  uint64_t total_bytes;     /* memory of the device */
  uint64_t free_bytes;      /* memory free now */
  uint32_t processors;      /* streaming multiprocessors, or threads used */
  uint32_t driver_version;  /* CUDA driver, 1000 * major + 10 * minor; 0 on the CPU */
  uint32_t runtime_version; /* CUDA runtime, likewise */
  uint32_t is_gpu;          /* 1 on CUDA */
} ph_device_info;

/* Number of devices this library can open: 1 for the CPU library; GPUs for the CUDA one, 0 without a driver. */
PH_API uint32_t ph_device_count(void);
/* Opens device `ordinal` with a stream of its own. */
PH_API ph_device* ph_device_open(uint32_t ordinal, int32_t* status, char* error, uint32_t error_bytes);
/* Opens GPU `ordinal` on a stream of the caller's: a cudaStream_t or CUstream of that GPU, 0 for CUDA's legacy default
 * stream; not the per-thread one. It must live as long as the device; closing leaves it open. Memory is allocated and
 * freed in its order. PH_ERROR_UNSUPPORTED on the CPU. */
PH_API ph_device* ph_device_open_on_stream(uint32_t ordinal, uint64_t stream, int32_t* status, char* error,
                                           uint32_t error_bytes);
/* Writes the device's stream, a cudaStream_t; 0 on the CPU. */
PH_API int32_t ph_device_stream(ph_device* device, uint64_t* stream, char* error, uint32_t error_bytes);
/* Waits for enqueued work, then frees the device. Its buffers must be gone. */
PH_API int32_t ph_device_close(ph_device* device, char* error, uint32_t error_bytes);
PH_API int32_t ph_device_get_info(ph_device* device, ph_device_info* info, char* error, uint32_t error_bytes);
/* Waits for all enqueued work. */
PH_API int32_t ph_device_synchronize(ph_device* device, char* error, uint32_t error_bytes);

/* Allocates `bytes` (> 0) of device memory, 256-byte aligned, contents undefined. */
PH_API ph_buffer* ph_buffer_create(ph_device* device, uint64_t bytes, int32_t* status, char* error,
                                   uint32_t error_bytes);
/* A buffer over `bytes` (> 0) of memory that is the caller's: of this GPU (as from cudaMalloc; not managed), or of this
 * process on the CPU. The address must be a multiple of 16, as kernels move 16 bytes at a time. The memory must stay until
 * the buffer is destroyed and the work that uses it is done; destroying the buffer does not free it. On CUDA,
 * PH_ERROR_INVALID_ARGUMENT if the first or the last byte is no memory of this GPU; the CPU checks nothing. */
PH_API ph_buffer* ph_buffer_wrap(ph_device* device, uint64_t address, uint64_t bytes, int32_t* status,
                                 char* error, uint32_t error_bytes);
/* Writes where the buffer is: a device pointer on CUDA, a pointer on the CPU. */
PH_API int32_t ph_buffer_address(ph_device* device, const ph_buffer* buffer, uint64_t* address, char* error,
                                 uint32_t error_bytes);
/* Frees the buffer once the work enqueued so far no longer needs it. */
PH_API int32_t ph_buffer_destroy(ph_device* device, ph_buffer* buffer, char* error, uint32_t error_bytes);
/* Copies host memory to the buffer, in stream order; waits until `source` may be reused. */
PH_API int32_t ph_buffer_upload(ph_device* device, ph_buffer* buffer, uint64_t offset, const void* source,
                                uint64_t bytes, char* error, uint32_t error_bytes);
/* Copies the buffer to host memory, in stream order; waits until `target` holds the bytes. */
PH_API int32_t ph_buffer_download(ph_device* device, const ph_buffer* buffer, uint64_t offset, void* target,
                                  uint64_t bytes, char* error, uint32_t error_bytes);
/* Host memory, `bytes` (> 0) of it, that a device copies to while the host goes on: page-locked on CUDA. Where
 * ph_buffer_download waits for all enqueued work, ph_readback_wait waits for what was enqueued before the copy only, so that
 * the next work can be enqueued meanwhile. */
typedef struct ph_readback ph_readback;
PH_API ph_readback* ph_readback_create(ph_device* device, uint64_t bytes, int32_t* status, char* error,
                                       uint32_t error_bytes);
/* Waits until a copy to it is done, then frees it. No other call may be using it. */
PH_API int32_t ph_readback_destroy(ph_device* device, ph_readback* readback, char* error,
                                   uint32_t error_bytes);
/* Enqueues a copy of `bytes` bytes (> 0, at most those it was created for) of the buffer. What was copied before is lost. */
PH_API int32_t ph_readback_enqueue(ph_device* device, ph_readback* readback, const ph_buffer* buffer,
                                   uint64_t offset, uint64_t bytes, char* error, uint32_t error_bytes);
/* Waits for the copy that was enqueued last, and writes its first `bytes` bytes, at most all, to `target`. */
PH_API int32_t ph_readback_wait(ph_device* device, ph_readback* readback, void* target, uint64_t bytes,
                                char* error, uint32_t error_bytes);
/* Enqueues a copy between buffers of one device; the ranges must not overlap. */
PH_API int32_t ph_buffer_copy(ph_device* device, ph_buffer* target, uint64_t target_offset,
                              const ph_buffer* source, uint64_t source_offset, uint64_t bytes, char* error,
                              uint32_t error_bytes);
/* Enqueues setting `bytes` bytes to `value`. */
PH_API int32_t ph_buffer_fill(ph_device* device, ph_buffer* buffer, uint64_t offset, uint32_t value,
                              uint64_t bytes, char* error, uint32_t error_bytes);
/* Enqueues reading bytes and doing nothing with them, as fast as the device can: what memory-bound work is measured
 * against. `offset` a multiple of 16. */
PH_API int32_t ph_buffer_read(ph_device* device, const ph_buffer* buffer, uint64_t offset, uint64_t bytes,
                              char* error, uint32_t error_bytes);
/* Milliseconds that the work enqueued between two marks took, by the device's own clock: `begin` marks the
 * start of a measured region, `end` waits for the work and writes the time. */
PH_API int32_t ph_device_timer_begin(ph_device* device, char* error, uint32_t error_bytes);
PH_API int32_t ph_device_timer_end(ph_device* device, float* milliseconds, char* error, uint32_t error_bytes);

/* ---- kv: the PackKV codec (arXiv 2512.24449) ------------------------------------------------------ */
/*
 * A layer's cache is a pair of tensors, keys (after RoPE) and values, each [heads, tokens, head_dim] of
 * f16, bf16 or f32. Every 64 consecutive tokens are a block; tokens % 64 are left to the caller (the tail
 * stays in its own type). A "part" is the keys or the values of a block. C = heads * head_dim.
 *
 * 1. Quantise. A group of values shares a scale and an integer zero point:
 *      packkv, per token: group = one token, all heads and channels           groups/part: 64
 *      packkv, per head:  group = one token of one head                       groups/part: heads * 64
 *      kivi, keys:        group = one channel over the block's 64 tokens      groups/part: heads * head_dim
 *      kivi, values:      group = 64 channels of one token and head (the last may be shorter)
 *                                                               groups/part: heads * 64 * ceil(head_dim/64)
 *    Group order: [token], [head][token], [head][channel], [head][token][channel group].
 *    With min and max over the group, in IEEE float32, nothing contracted, everything rounded to nearest even:
 *      scale = store((max - min) * rel)              packkv; code limit L = 255, rel in [1/254, 1]
 *      scale = store_up((max - min) / L)             kivi; L = 2^bits - 1, bits in {2, 3, 4, 8}
 *      zero  = round(min / scale)
 *      code  = clamp(round(x / scale) - zero, 0, L)
 *      x'    = (code + zero) * scale, clamped to the finite range of T
 *    store rounds to the input's type T (f16, bf16, f32) to nearest, store_up upwards; both then clamp to
 *    [smallest positive T, largest finite T]. If L * scale < max - min (a scale that lost its digits among
 *    subnormals), it is the next larger T. For f32 alone the scale is also at least max|x| * 2^-23, so that
 *    zero and code + zero are exact in float32.
 *    A constant group is exact: scale = |x| and zero = sign(x), or scale = 1 and zero = 0 for x = 0; codes 0.
 *    Error: |x' - x| <= scale / 2 plus two float32 ulps of the group's largest |x|.
 *    A group is non-finite if it holds a NaN or an infinity, or if max - min overflows float32.
 *
 * 2. Repack. One order of the block's 64 tokens, shared by keys, values and all heads: position i of the
 *    packed block holds token order[i].
 *      none:   order[i] = i.
 *      median: descending by the lower median (element (C-1)/2 of the sorted codes) of the token's value
 *              codes; stable.
 *      greedy: over the 2C codes (keys, then values) of each token. Every pack of P positions starts with a
 *              seed: among the tokens left, the one most cosine-similar to their mean, rounded half to even
 *              per channel. (Similarity is compared as dot * dot / squared norm of the token, in double, 0
 *              for a zero token.) Then, P - 1 times, the token left that adds least to the sum over channels
 *              of width(max - min) of the pack. Ties go to the lowest token.
 *      auto:   whichever of the three gives the block the fewest bits by formula (payload, plus 384 for a
 *              stored order unless it is the identity); ties go to the earlier in this list.
 *
 * 3. Pack. P consecutive positions of one channel form a pack: its minimum m, its width w = bits of
 *    (max - m) (0 for a constant pack), and P fields code - m of w bits.
 *
 * The record of a block ("packs" layout), all offsets in bytes from its start:
 *      0  u32 bytes        of the whole record, a multiple of 16
 *      4  u8  kind         0 packed, 1 raw
 *      5  u8  ordered      1 if the order is stored (it is whenever it is not the identity)
 *      6  u16 zero
 *      8  u32 keys         offset of the keys part; the values part starts right after the order (or header)
 *     12  u32 zero
 *     16  order, if stored: 64 fields of 6 bits, 48 bytes
 *    then the values part, then the keys part, each padded with zero bytes to a multiple of 16:
 *      0  u8 minimum_bits  bits of the part's largest minimum, 0..8
 *      1  u8 width_bits    bits of the part's largest width, 0..4
 *      2  u8 zero_bytes    1, 2 or 4: the smallest two's complement size that holds every zero point
 *      3  u8 zero
 *      4  u32 payload[heads]  where each head's payload starts, in bytes from the start of the payloads
 *         scales           groups * sizeof(T), padded to 4
 *         zero points      groups * zero_bytes, padded to 4
 *         pack headers     per row: head_dim times minimum_bits then width_bits, padded to 4 bytes
 *         payloads         per row: head_dim packs of P fields of w bits, padded to 4 bytes
 *    A row is the packs of one head and one position / P, channels ascending; rows are in the order
 *    [head][position / P]. Fields follow each other from the lowest bit of the lowest byte up. Padding is
 *    zero.
 *    A raw record is the header, then the values [heads, 64, head_dim], then the keys likewise, each padded
 *    to 16. Blocks with a non-finite group are stored raw when the codec says so, else they are an error.
 *
 * CPU and CUDA write the same bytes.
 */

enum ph_kv_quantizer { PH_KV_PACKKV = 0, PH_KV_KIVI = 1 };
enum ph_kv_grouping { PH_KV_PER_TOKEN = 0, PH_KV_PER_HEAD = 1 };
enum ph_kv_repack {
  PH_KV_REPACK_NONE = 0,
  PH_KV_REPACK_MEDIAN = 1,
  PH_KV_REPACK_GREEDY = 2,
  PH_KV_REPACK_AUTO = 3
};
enum ph_kv_part { PH_KV_KEYS = 0, PH_KV_VALUES = 1 };

/* Shape and codec of one layer. */
typedef struct ph_kv_codec {
  uint32_t heads;     /* kv heads, 1..4096 */
  uint32_t head_dim;  /* multiple of 16, 16..256 */
  uint64_t tokens;    /* tokens of the tensors; tokens / 64 blocks are packed */
  uint32_t dtype;     /* PH_F16, PH_BF16 or PH_F32 */
  uint32_t quantizer; /* ph_kv_quantizer */
  uint32_t grouping;  /* ph_kv_grouping; PH_KV_PER_TOKEN for kivi */
  uint32_t key_bits;  /* kivi: 2, 3, 4 or 8; else 0 */
  uint32_t value_bits;
  float key_rel; /* packkv: 1/254..1; else 0 */
  float value_rel;
  uint32_t repack;          /* ph_kv_repack */
  uint32_t pack;            /* P: 4, 8, 16 or 32 */
  uint32_t keep_non_finite; /* 1: store blocks with a NaN or an infinity raw; 0: report them */
} ph_kv_codec;

/* What measuring packed blocks found; arrays are [keys, values]. */
typedef struct ph_kv_statistics {
  uint64_t bytes;           /* of all records */
  uint64_t payload_bits[2]; /* sum of P * w over packs */
  uint64_t packs[2];
  uint64_t widths[18];    /* [part][w]: packs of width w = 0..8 */
  uint32_t code_mask[16]; /* [part][8]: bit c set if code c occurs */
  uint64_t raw_blocks;
  uint64_t ordered_blocks;
  double max_error[2]; /* max |x' - x| over packed blocks; this and what follows: 0 without originals */
  double max_error_over_scale[2];
  double squared_error[2]; /* sum of (x' - x)^2 */
  uint64_t compared[2];    /* values compared */
} ph_kv_statistics;

/* Sizes in bytes for a codec; UINT64_MAX if the codec is invalid. */
PH_API uint64_t ph_kv_records_capacity(const ph_kv_codec* codec); /* most bytes the records can take */
/* Scratch for encode, pack and measure; their `workspace` may be NULL where this is 0. */
PH_API uint64_t ph_kv_workspace_bytes(const ph_kv_codec* codec);
PH_API uint64_t ph_kv_groups(const ph_kv_codec* codec, uint32_t part); /* scale groups per block (a count) */

/* Step 1. x [heads, tokens, head_dim] of dtype -> codes u8 [blocks, 64, heads, head_dim],
 * scales f32 [blocks, groups], zeros i32 [blocks, groups]. `part` picks keys or values.
 * `status` is a device buffer of 16 bytes that every function taking one sets: u64 the first non-finite group as
 * (token << 24 | head << 8 | part), where token and head are those of its first non-finite value if it has one, or
 * UINT64_MAX (unpack, decode, measure: see ph_kv_unpack); u64 bytes of all records (encode, pack; else 0).
 * The codes of a block with a non-finite group are undefined. */
PH_API int32_t ph_kv_quantize(ph_device* device, const ph_kv_codec* codec, uint32_t part, const ph_buffer* x,
                              uint64_t x_offset, ph_buffer* codes, ph_buffer* scales, ph_buffer* zeros,
                              ph_buffer* status, char* error, uint32_t error_bytes);

/* Step 2. Codes of keys and values -> order u8 [blocks, 64]. greedy and auto on CUDA, here and in ph_kv_encode:
 * PH_ERROR_UNSUPPORTED where 10 bytes a channel exceed a thread block's shared memory (about 23,000 channels on an
 * H200, 9,900 on sm_86). */
PH_API int32_t ph_kv_repack(ph_device* device, const ph_kv_codec* codec, const ph_buffer* key_codes,
                            const ph_buffer* value_codes, ph_buffer* order, char* error,
                            uint32_t error_bytes);

/* Step 3. Codes, scales, zeros and order -> records, one after another, and offsets u64 [blocks + 1]. The
 * scales must be values of dtype. Blocks with a non-finite scale are an error of the caller. Each block's order must
 * be a permutation of 0..63; else its record may be malformed. Nothing outside the buffers is touched. */
PH_API int32_t ph_kv_pack(ph_device* device, const ph_kv_codec* codec, const ph_buffer* key_codes,
                          const ph_buffer* key_scales, const ph_buffer* key_zeros,
                          const ph_buffer* value_codes, const ph_buffer* value_scales,
                          const ph_buffer* value_zeros, const ph_buffer* order, ph_buffer* records,
                          ph_buffer* offsets, ph_buffer* workspace, ph_buffer* status, char* error,
                          uint32_t error_bytes);

/* All three steps at once. For none and median one kernel reads each block once. */
PH_API int32_t ph_kv_encode(ph_device* device, const ph_kv_codec* codec, const ph_buffer* keys,
                            uint64_t keys_offset, const ph_buffer* values, uint64_t values_offset,
                            ph_buffer* records, ph_buffer* offsets, ph_buffer* workspace, ph_buffer* status,
                            char* error, uint32_t error_bytes);

/* Inverse of step 3, in the original order of tokens. Raw blocks have none: codes and zeros 0, scales NaN. The
 * records are untrusted: the lowest block whose record is not well formed goes to `status` (its first u64, else
 * UINT64_MAX); what such a block's outputs, and the statistics, then hold is undefined. Nothing outside the given
 * buffers is touched. Where minimum + field exceeds 255 the codes are unspecified. */
PH_API int32_t ph_kv_unpack(ph_device* device, const ph_kv_codec* codec, const ph_buffer* records,
                            uint64_t records_bytes, const ph_buffer* offsets, ph_buffer* key_codes,
                            ph_buffer* key_scales, ph_buffer* key_zeros, ph_buffer* value_codes,
                            ph_buffer* value_scales, ph_buffer* value_zeros, ph_buffer* order,
                            ph_buffer* status, char* error, uint32_t error_bytes);

/* Inverse of step 1: x' = (code + zero) * scale, rounded to dtype, into the first blocks * 64 tokens of x. */
PH_API int32_t ph_kv_dequantize(ph_device* device, const ph_kv_codec* codec, uint32_t part,
                                const ph_buffer* codes, const ph_buffer* scales, const ph_buffer* zeros,
                                ph_buffer* x, uint64_t x_offset, char* error, uint32_t error_bytes);

/* Records -> keys and values [heads, tokens, head_dim] of dtype, first blocks * 64 tokens, in the original
 * order. Untrusted records as in ph_kv_unpack. */
PH_API int32_t ph_kv_decode(ph_device* device, const ph_kv_codec* codec, const ph_buffer* records,
                            uint64_t records_bytes, const ph_buffer* offsets, ph_buffer* keys,
                            uint64_t keys_offset, ph_buffer* values, uint64_t values_offset,
                            ph_buffer* status, char* error, uint32_t error_bytes);

/* Statistics of records into `statistics` (one ph_kv_statistics). With keys and values (NULL for neither)
 * also the errors, measured in float32 before rounding to dtype. Untrusted records as in ph_kv_unpack.
 * Deterministic. */
PH_API int32_t ph_kv_measure(ph_device* device, const ph_kv_codec* codec, const ph_buffer* records,
                             uint64_t records_bytes, const ph_buffer* offsets, const ph_buffer* keys,
                             uint64_t keys_offset, const ph_buffer* values, uint64_t values_offset,
                             ph_buffer* statistics, ph_buffer* workspace, ph_buffer* status, char* error,
                             uint32_t error_bytes);

/* ---- kv cache: packed, growing, read by attention ------------------------------------------------- */
/*
 * A cache holds the keys and values of `layers` layers for up to `sequences` sequences. Tokens arrive in steps: a step
 * appends one or more tokens to some of the sequences, in every layer. The first `sinks` tokens of a sequence and its
 * newest stay as they came, in 16 bits; as soon as `residual` tokens or more would remain after it, a block of 64 tokens
 * is packed in the "tiles" layout (cuda/kv/tile.h), which attention unpacks in registers. Keys and values are packed
 * independently, as the codec above does it without repacking (a width spans the whole block):
 *   packkv: per token, over all kv heads and channels: scale = store((max - min) * rel); codes up to ceil(1 / rel) + 1
 *   fixed:  likewise: scale = store_up((max - min) / (2^bits - 1)); every residual takes `bits` bits
 *   kivi:   groups as above: of keys, a channel over the block's 64 tokens; of values, 64 channels of a token and head;
 *           scale and residuals as for fixed
 *   raw16:  values stay as they are, those that are not finite too
 * Zero points have 16 bits: where one would not fit, the scale is raised until it does, to at most |min| / 32767.
 * A constant group is exact, as above, but its scale is |x| / 2^k for the largest k up to 14 that makes it a value of T,
 * and its zero point sign(x) * 2^k; for x = 0 the scale is the smallest positive T.
 * Widths are chosen on the device, per block, head and group of 32 channels; records take the bytes they need, in pages
 * of 65,536 bytes from a pool of fixed size.
 *
 * A layer may have a sliding window: the token at position p attends to those at p - window + 1 to p, and to the sinks.
 * Packed blocks outside are not read, and when the pool would not do for a step, begin gives back the pages that hold
 * nothing but blocks which no token to come attends to. Their tokens are gone then: they can't be read, and a sequence
 * can't be truncated to where its next token would attend to them.
 *
 * attend cuts a sequence's tokens into pieces, of which thread blocks on CUDA, or threads, take one for each kv head. How
 * many follows from the sequence's own length and `splits`. At least, it is what fills a GPU with a batch of many sequences:
 * one for each 9,216 tokens, from 36,865 on one for each 4,032. A sequence that has fewer than `splits` gets as many, as far
 * as each then has 1,024 tokens: where there are few sequences, 256 / (sequences * kv_heads) make them faster. Sums of
 * pieces are added in their order, so that `splits` changes how results are rounded.
 *
 * A cache belongs to its device and to one thread at a time. No call allocates device memory after creation. append,
 * attend and prefill only enqueue; begin too, unless the pool looks exhausted by the largest sizes that records can have:
 * then it waits for the device to learn the true ones. On CUDA what begin uploads passes through 2 MiB of pinned memory;
 * it waits for a part of that only if the GPU is as many uploads behind.
 */

typedef struct ph_kv_cache ph_kv_cache;

enum ph_kv_cache_quantizer {
  PH_KV_CACHE_PACKKV = 0,
  PH_KV_CACHE_FIXED = 1,
  PH_KV_CACHE_RAW16 = 2,
  PH_KV_CACHE_KIVI = 3
};

typedef struct ph_kv_cache_config {
  uint32_t layers;      /* 1..4096 */
  uint32_t query_heads; /* kv_heads times a group of 1..16 */
  uint32_t kv_heads;    /* 1..1024 */
  uint32_t head_dim;    /* 64, 96, 128 or 256 */
  uint32_t dtype;       /* PH_F16 or PH_BF16: of tokens */
  uint32_t query_dtype; /* of queries and outputs: dtype, or PH_F32 on the CPU (else PH_ERROR_UNSUPPORTED) */
  uint32_t sequences;   /* most at once, 1..65536 */
  uint32_t residual;    /* newest tokens that stay in 16 bits at least, 8..65536 */
  uint32_t sinks;       /* first tokens that stay in 16 bits, 0..65536 */
  uint32_t splits;      /* pieces of a sequence, see above, 0..1024 */
  uint64_t tokens;      /* most tokens of a sequence */
  uint64_t step_tokens; /* most tokens of a step, over all its sequences */
  uint64_t pool_bytes;  /* for packed blocks; rounded down to pages */
} ph_kv_cache_config;

/* How a layer is packed, and how much of a sequence it attends to. */
typedef struct ph_kv_cache_codec {
  uint32_t key_quantizer; /* ph_kv_cache_quantizer */
  uint32_t value_quantizer;
  uint32_t key_bits; /* fixed, kivi: 1..8; else 0 */
  uint32_t value_bits;
  float key_rel; /* packkv: 1/254..1; else 0 */
  float value_rel;
  uint32_t window; /* tokens that a token attends to, itself included, beside the sinks; 0: all */
} ph_kv_cache_codec;

/* Every byte that a cache has allocated, by purpose, and what is in it. */
typedef struct ph_kv_cache_statistics {
  uint64_t pool_bytes;       /* pages for packed blocks */
  uint64_t recent_bytes;     /* tokens in 16 bits */
  uint64_t index_bytes;      /* where records end */
  uint64_t page_table_bytes; /* where pages are */
  uint64_t step_bytes;       /* the plan of a step */
  uint64_t workspace_bytes;  /* scratch of append and attend */
  uint64_t free_bytes;       /* pages of the pool that no sequence holds */
  uint64_t packed_bytes;     /* records held; those that sequences share count once for each */
  uint64_t sequences;        /* alive */
  uint64_t tokens;           /* of all sequences */
  uint64_t packed_tokens;    /* of these, packed, those included that windows have left */
} ph_kv_cache_statistics;

/* Creates a cache and all its memory. `codecs` has one entry per layer. */
PH_API ph_kv_cache* ph_kv_cache_create(ph_device* device, const ph_kv_cache_config* config,
                                       const ph_kv_cache_codec* codecs, int32_t* status, char* error,
                                       uint32_t error_bytes);
/* What creation would allocate, without a device and without allocating: the statistics of the cache before its first
 * sequence. block_bytes, [layers][2]: the least and the most bytes that a packed block of a layer takes, over all
 * kv heads. Attention's scratch is that of this library's backend. */
PH_API int32_t ph_kv_cache_plan(const ph_kv_cache_config* config, const ph_kv_cache_codec* codecs,
                                ph_kv_cache_statistics* statistics, uint64_t* block_bytes, char* error,
                                uint32_t error_bytes);
/* Frees the cache once the work enqueued so far no longer needs it. */
PH_API int32_t ph_kv_cache_destroy(ph_device* device, ph_kv_cache* cache, char* error, uint32_t error_bytes);

/* Starts an empty sequence and writes its number. */
PH_API int32_t ph_kv_cache_add(ph_device* device, ph_kv_cache* cache, uint32_t* sequence, char* error,
                               uint32_t error_bytes);
/* Starts a sequence with the tokens of another; they share packed pages until one of them writes to it. Waits for
 * the device. */
PH_API int32_t ph_kv_cache_fork(ph_device* device, ph_kv_cache* cache, uint32_t sequence, uint32_t* fork,
                                char* error, uint32_t error_bytes);
/* Keeps the first `tokens` tokens of a sequence. Tokens of a block that is cut go back to 16 bits with the values
 * they were packed to. PH_ERROR_INVALID_ARGUMENT if the next token would attend to tokens that were given back. Waits for
 * the device. */
PH_API int32_t ph_kv_cache_truncate(ph_device* device, ph_kv_cache* cache, uint32_t sequence, uint64_t tokens,
                                    char* error, uint32_t error_bytes);
/* Ends a sequence; its number may be given again. This, and truncate, end the step: no attention until the next. */
PH_API int32_t ph_kv_cache_remove(ph_device* device, ph_kv_cache* cache, uint32_t sequence, char* error,
                                  uint32_t error_bytes);
/* Tokens of a sequence, those of a step that has begun included. */
PH_API int32_t ph_kv_cache_length(ph_device* device, ph_kv_cache* cache, uint32_t sequence, uint64_t* tokens,
                                  char* error, uint32_t error_bytes);

/* Begins a step: sequence sequences[i] will get tokens[i] (> 0) more tokens in every layer. Reserves pages and plans
 * attention. PH_ERROR_OUT_OF_MEMORY leaves the cache as it was. Every layer must have been appended to since the last
 * step began. */
PH_API int32_t ph_kv_cache_begin(ph_device* device, ph_kv_cache* cache, const uint32_t* sequences,
                                 const uint32_t* tokens, uint32_t count, char* error, uint32_t error_bytes);
/* Appends the step's tokens to a layer, once a step: keys (after RoPE) and values [step tokens, kv_heads, head_dim],
 * the tokens of sequences[0] first. Packs the blocks that are due. */
PH_API int32_t ph_kv_cache_append(ph_device* device, ph_kv_cache* cache, uint32_t layer,
                                  const ph_buffer* keys, uint64_t keys_offset, const ph_buffer* values,
                                  uint64_t values_offset, char* error, uint32_t error_bytes);
/* Attention of the step's tokens over their sequences, after the layer's append: queries and out
 * [step tokens, query_heads, head_dim] of query_dtype. out = softmax(scale * q . K) . V, causal; query head h reads kv head
 * h / (query_heads / kv_heads). At most 8 tokens per sequence; ph_kv_cache_prefill takes any number. Relative error within 1e-3 of exact attention over the
 * unpacked values. Deterministic: a sequence's results do not depend on the rest of the batch. */
PH_API int32_t ph_kv_cache_attend(ph_device* device, ph_kv_cache* cache, uint32_t layer,
                                  const ph_buffer* queries, uint64_t queries_offset, ph_buffer* out,
                                  uint64_t out_offset, float scale, char* error, uint32_t error_bytes);

/* Attention of the step's tokens, any number per sequence, and their append, in one call in place of append and attend:
 * keys and values as append takes them, queries and out as attend does. The tokens attend to what their sequences held
 * before the step and, causally, to each other as they are in `keys` and `values`, in 16 bits; then they are appended,
 * with the very bytes that append writes. `out` must not overlap the other tensors. Error and determinism as attend. */
PH_API int32_t ph_kv_cache_prefill(ph_device* device, ph_kv_cache* cache, uint32_t layer,
                                   const ph_buffer* queries, uint64_t queries_offset, const ph_buffer* keys,
                                   uint64_t keys_offset, const ph_buffer* values, uint64_t values_offset,
                                   ph_buffer* out, uint64_t out_offset, float scale, char* error,
                                   uint32_t error_bytes);

/* Tokens [first, first + count) of a sequence as attention sees them, rounded to dtype: keys and values
 * [count, kv_heads, head_dim]. PH_ERROR_INVALID_ARGUMENT if some of them were given back. */
PH_API int32_t ph_kv_cache_read(ph_device* device, ph_kv_cache* cache, uint32_t layer, uint32_t sequence,
                                uint64_t first, uint64_t count, ph_buffer* keys, uint64_t keys_offset,
                                ph_buffer* values, uint64_t values_offset, char* error, uint32_t error_bytes);
/* The two products of attention alone, for all `length` tokens of a sequence, without a mask; queries, weights and out
 * as query heads see them: head h reads kv head h / (query_heads / kv_heads). Packed tokens are unpacked in registers.
 * Relative errors (L2) are within 1e-3 of exact products with what tokens are unpacked to, and results are the same
 * bits every time. PH_ERROR_INVALID_ARGUMENT if the sequence has no tokens, the layer lacks those of the step, or
 * some were given back.
 * score: out[h, t] = scale * queries[h] . keys[t], queries [query_heads, head_dim] of the cache's dtype, out
 * [query_heads, length] f32; scale positive and finite. */
PH_API int32_t ph_kv_cache_score(ph_device* device, ph_kv_cache* cache, uint32_t layer, uint32_t sequence,
                                 const ph_buffer* queries, uint64_t queries_offset, ph_buffer* out,
                                 uint64_t out_offset, float scale, char* error, uint32_t error_bytes);
/* weigh: out[h] = sum over t of weights[h, t] * values[t], weights [query_heads, length] f32 of any sign, finite, out
 * [query_heads, head_dim] f32. `out` must not overlap weights. */
PH_API int32_t ph_kv_cache_weigh(ph_device* device, ph_kv_cache* cache, uint32_t layer, uint32_t sequence,
                                 const ph_buffer* weights, uint64_t weights_offset, ph_buffer* out,
                                 uint64_t out_offset, char* error, uint32_t error_bytes);
/* Waits for the device. PH_ERROR_NON_FINITE names the first sequence and token that was packed with a value that
 * is not finite (it counts as 0, but raw16 keeps it and is not reported), if there was one since the last call. */
PH_API int32_t ph_kv_cache_check(ph_device* device, ph_kv_cache* cache, char* error, uint32_t error_bytes);
/* Waits for the device. */
PH_API int32_t ph_kv_cache_get_statistics(ph_device* device, ph_kv_cache* cache,
                                          ph_kv_cache_statistics* statistics, char* error,
                                          uint32_t error_bytes);

/*
 * CUDA graphs: the work of a step, captured once, runs again in later steps of the same shape by one launch. A step still
 * begins with ph_kv_cache_begin, which is not captured.
 *
 *   begin; shape; graph known?  yes: replay(graph)
 *                               no:  capture_begin; append and attend, or prefill; graph = capture_end; replay(graph)
 *
 * Between capture_begin and capture_end nothing runs. append, attend and prefill of this cache, ph_buffer_copy,
 * ph_buffer_fill, the functions of sections "llm" and "graph" that only enqueue, and whatever the caller enqueues on the stream become
 * part of the graph; buffers may be wrapped or destroyed (the memory is freed when the capture ends), a cache destroyed
 * (its capture is abandoned). Every other call on the device is PH_ERROR_INVALID_ARGUMENT and does no harm. A graph holds
 * the addresses and the scale of the calls it captured: their memory must stay as long as the graph is replayed.
 */
typedef struct ph_kv_cache_graph ph_kv_cache_graph;

/* Words of a shape: sequences, tokens, blocks to pack, pieces of attention, most tokens and most pieces of a sequence. */
#define PH_KV_CACHE_SHAPE_WORDS 6u

/* Writes the shape of the current step, PH_KV_CACHE_SHAPE_WORDS words: graphs are good for steps of an equal shape. */
PH_API int32_t ph_kv_cache_step_shape(ph_device* device, ph_kv_cache* cache, uint32_t* shape, char* error,
                                      uint32_t error_bytes);
/* Begins to capture work of the current step. PH_ERROR_UNSUPPORTED on the CPU and on the legacy default stream. */
PH_API int32_t ph_kv_cache_capture_begin(ph_device* device, ph_kv_cache* cache, char* error,
                                         uint32_t error_bytes);
/* Ends the capture; the step is as it was before. Whatever it returns, work on the device runs again. */
PH_API ph_kv_cache_graph* ph_kv_cache_capture_end(ph_device* device, ph_kv_cache* cache, int32_t* status,
                                                  char* error, uint32_t error_bytes);
/* Enqueues the captured work for the current step. PH_ERROR_INVALID_ARGUMENT, which changes nothing, for a step of another
 * shape, a graph of another cache, and where a layer has the step's tokens already or lacks those that are attended to. */
PH_API int32_t ph_kv_cache_replay(ph_device* device, ph_kv_cache* cache, ph_kv_cache_graph* graph,
                                  char* error, uint32_t error_bytes);
/* Frees the graph; work of its that is enqueued is done all the same. Its cache may be gone, its device must not. */
PH_API int32_t ph_kv_cache_graph_destroy(ph_device* device, ph_kv_cache_graph* graph, char* error,
                                         uint32_t error_bytes);

/* A sequence to host memory and back, a layer at a time: into a cache of the same layers, kv_heads, head_dim, dtype,
 * codecs and sinks, with the bits that it had. A layer is
 *   records  those of its packed blocks, one after another: per block the parameters, then a record per kv head
 *   offsets  u64 [blocks + 1]: block b's records go from offsets[b] to offsets[b + 1]; the first is 0
 *   recent   tokens in 16 bits, in their order, which are the sinks and those after the blocks:
 *            keys [kv_heads, tokens - 64 * blocks, head_dim], then values
 * A sequence of the step that has begun can be measured and exported once all layers have its tokens. */

/* The packed blocks of a sequence, and the bytes of their records in each layer: record_bytes[layers]. Waits for the
 * device. */
PH_API int32_t ph_kv_cache_measure(ph_device* device, ph_kv_cache* cache, uint32_t sequence, uint32_t* blocks,
                                   uint64_t* record_bytes, char* error, uint32_t error_bytes);
/* Writes a layer of a sequence to host memory; sizes must be what ph_kv_cache_measure says. Waits for the device. */
PH_API int32_t ph_kv_cache_export(ph_device* device, ph_kv_cache* cache, uint32_t sequence, uint32_t layer,
                                  uint8_t* records, uint64_t record_bytes, uint64_t* offsets, uint8_t* recent,
                                  uint64_t recent_bytes, char* error, uint32_t error_bytes);
/* Takes a slot and pages for a sequence of which `blocks` blocks are packed, and writes its number. No function but
 * ph_kv_cache_import and ph_kv_cache_remove, which gives all back, takes it until every layer was imported. The
 * cache's residual may be another than the exporting one's, provided that the newest tokens in 16 bits are fewer than
 * residual + 64. PH_ERROR_OUT_OF_MEMORY, and every other error, leaves the cache as it was. */
PH_API int32_t ph_kv_cache_begin_import(ph_device* device, ph_kv_cache* cache, uint64_t tokens,
                                        uint32_t blocks, const uint64_t* record_bytes, uint32_t* sequence,
                                        char* error, uint32_t error_bytes);
/* Imports a layer, once, in any order; with the last one the sequence is there. The memory is untrusted: if a block is
 * none that an encoder writes, nothing of the layer is imported, the status is PH_ERROR_CORRUPT, the message says what
 * is wrong with the block, and its number goes to `malformed` (else UINT64_MAX). */
PH_API int32_t ph_kv_cache_import(ph_device* device, ph_kv_cache* cache, uint32_t sequence, uint32_t layer,
                                  const uint8_t* records, uint64_t record_bytes, const uint64_t* offsets,
                                  const uint8_t* recent, uint64_t recent_bytes, uint64_t* malformed,
                                  char* error, uint32_t error_bytes);

/* ---- llm: what a language model computes beside attention ------------------------------------------ */
/*
 * Calls only enqueue, but for ph_llm_prepare_linear, allocate nothing, and may be captured (ph_kv_cache_capture_begin). A
 * tensor is a buffer, a byte
 * offset and, where more than one will do, a dtype, of PH_F32, PH_F16 and PH_BF16; values are computed in float32 and
 * rounded once, to nearest even, when stored. Results are the same bits every time. Unless it says so, an output must not
 * overlap an input. Sizes are at least 1; tensors are dense, but for row strides, which are in elements.
 */

/* out[rows, out_features] = x[rows, in_features] . transposed weight[out_features, in_features], plus bias[out_features]
 * unless it is NULL, plus what out holds if accumulate is 1. Sums are in float32.
 * CPU: all dtypes; a row's results do not depend on the other rows, nor on the number of threads.
 * CUDA: up to 8 rows are multiplied by a kernel of Packhorse's own, of which the same is true; more by cuBLAS, which is
 * opened at the first such call: PACKHORSE_CUBLAS names the library, else libcublas.so.13, then .12; PH_ERROR_UNSUPPORTED
 * without it, or if that first call is captured. x must have the weight's dtype, or up to 8 rows be f32; of more rows, out
 * must be f32 or have x's dtype, and bias and product are rounded to out's dtype before they are added. */
PH_API int32_t ph_llm_linear(ph_device* device, const ph_buffer* x, uint64_t x_offset, uint32_t x_dtype,
                             const ph_buffer* weight, uint64_t weight_offset, uint32_t weight_dtype,
                             const ph_buffer* bias, uint64_t bias_offset, uint32_t bias_dtype, ph_buffer* out,
                             uint64_t out_offset, uint32_t out_dtype, uint32_t rows, uint32_t in_features,
                             uint32_t out_features, uint32_t accumulate, char* error, uint32_t error_bytes);
/* Loads what multiplies more than 8 rows, if it is not loaded yet, and writes its name and version, NUL-terminated, cut
 * at name_bytes. May wait for the device. PH_ERROR_UNSUPPORTED where it is missing; the message says what to install. */
PH_API int32_t ph_llm_prepare_linear(ph_device* device, char* name, uint32_t name_bytes, char* error,
                                     uint32_t error_bytes);

/* out[i] = x[indices[i]] for i < rows; x [x_rows, width], indices i32. An index that is no row of x gives a row of NaN. */
PH_API int32_t ph_llm_gather(ph_device* device, const ph_buffer* x, uint64_t x_offset, uint32_t x_dtype,
                             uint32_t x_rows, const ph_buffer* indices, uint64_t indices_offset,
                             ph_buffer* out, uint64_t out_offset, uint32_t out_dtype, uint32_t rows,
                             uint32_t width, char* error, uint32_t error_bytes);

/* out[row, group] = x[row, group] / sqrt(mean of x[row, group]^2 + epsilon) * weight[width]: x and out [rows, groups, width],
 * where rows of x start x_stride elements apart and those of out out_stride. out may be x, with equal strides. */
PH_API int32_t ph_llm_rms_norm(ph_device* device, const ph_buffer* x, uint64_t x_offset, uint32_t x_dtype,
                               uint32_t x_stride, const ph_buffer* weight, uint64_t weight_offset,
                               uint32_t weight_dtype, ph_buffer* out, uint64_t out_offset, uint32_t out_dtype,
                               uint32_t out_stride, uint32_t rows, uint32_t groups, uint32_t width,
                               float epsilon, char* error, uint32_t error_bytes);

/* Rotary embedding of x [rows, heads, head_dim]: channels i and i + rotary_dim / 2 of a head, i < rotary_dim / 2, are
 * turned by the angle positions[row] * frequencies[i] and multiplied by `scale`; those from rotary_dim on are copied.
 * rotary_dim is even, up to head_dim and 1024; positions i32 [rows], frequencies f32 [rotary_dim / 2]; strides and out as in ph_llm_rms_norm. */
PH_API int32_t ph_llm_rope(ph_device* device, const ph_buffer* x, uint64_t x_offset, uint32_t x_dtype,
                           uint32_t x_stride, const ph_buffer* positions, uint64_t positions_offset,
                           const ph_buffer* frequencies, uint64_t frequencies_offset, ph_buffer* out,
                           uint64_t out_offset, uint32_t out_dtype, uint32_t out_stride, uint32_t rows,
                           uint32_t heads, uint32_t head_dim, uint32_t rotary_dim, float scale, char* error,
                           uint32_t error_bytes);

/* out[rows, width] = gate / (1 + exp(-gate)) * up; gate and up of one dtype, their rows `stride` elements apart. */
PH_API int32_t ph_llm_swiglu(ph_device* device, const ph_buffer* gate, uint64_t gate_offset,
                             const ph_buffer* up, uint64_t up_offset, uint32_t dtype, uint32_t stride,
                             ph_buffer* out, uint64_t out_offset, uint32_t out_dtype, uint32_t rows,
                             uint32_t width, char* error, uint32_t error_bytes);

/* out[rows, width] = x, whose rows start x_stride elements apart. */
PH_API int32_t ph_llm_cast(ph_device* device, const ph_buffer* x, uint64_t x_offset, uint32_t x_dtype,
                           uint32_t x_stride, ph_buffer* out, uint64_t out_offset, uint32_t out_dtype,
                           uint32_t rows, uint32_t width, char* error, uint32_t error_bytes);

/* x += y, `count` elements. */
PH_API int32_t ph_llm_add(ph_device* device, ph_buffer* x, uint64_t x_offset, uint32_t x_dtype,
                          const ph_buffer* y, uint64_t y_offset, uint32_t y_dtype, uint64_t count,
                          char* error, uint32_t error_bytes);

/* counters[i] += by for i < count, i32, wrapping. */
PH_API int32_t ph_llm_advance(ph_device* device, ph_buffer* counters, uint64_t counters_offset,
                              uint32_t count, int32_t by, char* error, uint32_t error_bytes);

/* out[row] = the first index of the row's largest logit, i32 [rows]; logits [rows, vocabulary]. NaN counts as -infinity;
 * a row of nothing else gives -1. */
PH_API int32_t ph_llm_argmax(ph_device* device, const ph_buffer* logits, uint64_t logits_offset,
                             uint32_t logits_dtype, ph_buffer* out, uint64_t out_offset, uint32_t rows,
                             uint32_t vocabulary, char* error, uint32_t error_bytes);

/* How a row's next token is drawn. */
typedef struct ph_llm_sampler {
  uint64_t seed;     /* of the row's random numbers */
  uint32_t step;     /* which of them is next; ph_llm_sample counts on */
  uint32_t top_k;    /* tokens that may be drawn; 0: all */
  float temperature; /* what logits are divided by; 0: always the likeliest token */
  float top_p;       /* probability that the likeliest tokens have to reach, above 0, up to 1: all */
  float min_p;       /* least probability relative to the likeliest token's, 0: none, to 1 */
  float
      repetition_penalty; /* above 0: logits of tokens that were seen are divided by it, negative ones multiplied */
} ph_llm_sampler;

/* out[row] = a token drawn from logits [rows, vocabulary] as samplers[row], a ph_llm_sampler of 32 bytes on the device,
 * says; i32 [rows]. The order, and the meaning, are those of Hugging Face's processors:
 *   1. repetition_penalty, for tokens with seen[row, token] != 0; seen is u8 [rows, vocabulary], or NULL for none
 *   2. division by the temperature; a temperature of 0 takes the first index of the largest logit now
 *   3. top_k: tokens at least as likely as the k-th likeliest stay
 *   4. top_p: a token goes if it and all less likely ones have a probability of at most 1 - top_p together
 *   5. min_p, of what is left
 *   6. with w = exp(logit - largest logit), in float32, rounded to multiples of 2^-31, and W the sum of those that are left:
 *      the first token whose w and those of the tokens before it have a sum above u * W, where u < 1 is word 1 of
 *      Philox4x32-10 for the counter (step, 0, 0, 0) and the key `seed`, and then its word 0, as a fraction of 64 bits
 * Tokens that are equally likely stay or go together. w, and so the token, is the same bits on the CPU and on CUDA. A NaN
 * counts as -infinity; a row of nothing else gives -1. Then seen[row, token] = 1, and the row's step is counted on.
 * scratch: 4 bytes [rows, vocabulary]. */
PH_API int32_t ph_llm_sample(ph_device* device, const ph_buffer* logits, uint64_t logits_offset,
                             uint32_t logits_dtype, ph_buffer* samplers, uint64_t samplers_offset,
                             ph_buffer* seen, uint64_t seen_offset, ph_buffer* scratch,
                             uint64_t scratch_offset, ph_buffer* out, uint64_t out_offset, uint32_t rows,
                             uint32_t vocabulary, char* error, uint32_t error_bytes);
/* seen[tokens[i]] = 1 for i < count; tokens i32, seen u8 [vocabulary]. Those that are no token of the vocabulary are left
 * out. */
PH_API int32_t ph_llm_mark(ph_device* device, const ph_buffer* tokens, uint64_t tokens_offset, uint32_t count,
                           ph_buffer* seen, uint64_t seen_offset, uint32_t vocabulary, char* error,
                           uint32_t error_bytes);

/* out[row] = log(sum of exp(logits[row])) - logits[row, targets[row]], in nats; targets i32 [rows], out f32 [rows]. NaN for
 * a target that is no token. Sums are in float64, of exponentials in float32. */
PH_API int32_t ph_llm_cross_entropy(ph_device* device, const ph_buffer* logits, uint64_t logits_offset,
                                    uint32_t logits_dtype, const ph_buffer* targets, uint64_t targets_offset,
                                    ph_buffer* out, uint64_t out_offset, uint32_t rows, uint32_t vocabulary,
                                    char* error, uint32_t error_bytes);
/* out[row] = {the Kullback-Leibler divergence of softmax(logits[row]) from softmax(reference[row]), sum of p * log(p / q)
 * for p of the reference, in nats; 1 if the largest of both is at the same index, else 0}, f32 [rows, 2]. Its error is about
 * 1e-7 at most. */
PH_API int32_t ph_llm_divergence(ph_device* device, const ph_buffer* reference, uint64_t reference_offset,
                                 uint32_t reference_dtype, const ph_buffer* logits, uint64_t logits_offset,
                                 uint32_t logits_dtype, ph_buffer* out, uint64_t out_offset, uint32_t rows,
                                 uint32_t vocabulary, char* error, uint32_t error_bytes);

/* ---- ot: optimal transport on ragged batches -------------------------------------------------------- */
/*
 * A batch is problems of n rows and m columns each, of any sizes, that follow each other without padding: masses a and
 * potentials f of all rows are one tensor, those of columns (b, g) another, and so are the entries of all n x m matrices
 * (costs C, plans T; row-major). All have the batch's dtype: PH_F32, or on the CPU also PH_F64; the CPU computes in float64.
 *
 *   T = argmin over T >= 0 of <T, C> - epsilon * H(T), H(T) = -sum T (log T - 1), so that T1 = a and T'1 = b
 *   T_ij = exp((f_i + g_j - C_ij) / epsilon), found by Sinkhorn's iterations: f_i = epsilon log a_i - epsilon log sum_j
 *   exp((g_j - C_ij) / epsilon), then g likewise from f, until sum |T1 - a| + sum |T'1 - b| is at most the tolerance.
 *
 * A cost of +infinity forbids a pair. Rows and columns without mass take no part: f or g is -infinity there. Every problem
 * stops by itself, and its results do not depend on the others. Calls only enqueue, but for those that create, set and
 * destroy batches, and give the same bits every time. An output must not overlap an input.
 */

/* The cost of points x and y. */
enum ph_ot_cost {
  PH_OT_SQEUCLIDEAN = 0, /* sum (x - y)^2, not halved */
  PH_OT_EUCLIDEAN = 1,
  PH_OT_COSINE = 2, /* 1 - x.y / (|x| |y|); 1 if either is 0 */
  PH_OT_DOT = 3     /* -x.y */
};

/* How a problem ended. From PH_OT_INFEASIBLE on there is no answer: potentials and plans are 0, cost and value NaN. */
enum ph_ot_status {
  PH_OT_CONVERGED = 0,
  PH_OT_ITERATION_LIMIT = 1, /* the marginal error is above the tolerance */
  PH_OT_INFEASIBLE = 2, /* place: the first row, or n + column, with mass and no partner of finite cost */
  /* A NaN, or an infinity that is no cost of +infinity. place: its index in the problem's part of the tensor that has it */
  PH_OT_NON_FINITE_COST = 3,
  PH_OT_NON_FINITE_POINT = 4, /* in the points x, then y: place counts on */
  /* A mass is negative or not finite; place: the row, or n + column. Or place is n + m: totals differ by more than 1e-4 of
   * the larger, or are 0. (Smaller differences: b is scaled to a's total.) */
  PH_OT_INVALID_MASS = 5,
  /* Of ph_ot_gromov, in the distances x, then y: place counts on. */
  PH_OT_NON_FINITE_DISTANCE = 6,
  PH_OT_ASYMMETRIC_DISTANCE = 7 /* from its mirror image, by more than 1e-5 of the largest distance */
};

typedef struct ph_ot_report {
  uint32_t status; /* ph_ot_status */
  uint32_t iterations;
  uint64_t place;
  double marginal_error; /* sum |T1 - a| + sum |T'1 - b| */
  double cost;           /* <T, C> */
  double value;          /* <T, C> - epsilon * H(T), plus the penalties */
  double epsilon;        /* absolute */
} ph_ot_report;

typedef struct ph_ot_options {
  uint32_t cost_kind;        /* ph_ot_cost, of points */
  uint32_t relative_epsilon; /* 1: epsilons are relative to the largest finite |cost| of the problem */
  uint32_t iterations;       /* at most, at least 1; an iteration updates f and g */
  double epsilon;            /* above 0 */
  double tolerance;          /* not negative */
  /* omega in [1, 2): f += omega * (update - f), likewise g, once the marginal error is at most 0.05 of a's total */
  double relaxation;
  /* 0, or in (0, 1): iterations begin at the epsilon of the largest finite |cost|, which is multiplied by this whenever the
   * marginal error is at most 0.05 of a's total, until it is the problem's */
  double scaling;
  /* + penalty * KL(T1 | a) instead of T1 = a, likewise for columns; infinity: the marginal holds. KL(p | q) = sum p
   * log(p / q) - p + q. Where finite, the error of a marginal is its distance from a * exp(-f / penalty). */
  double row_penalty;
  double column_penalty;
} ph_ot_options;

typedef struct ph_ot_batch ph_ot_batch;

/* A batch of problems of rows[p] x columns[p], at least 1 each, host memory [problems]. dimension: of points, 0 if costs are
 * matrices. streaming: 1 if n x m entries of a problem are never to be held anywhere, for few large problems of points.
 * backward: 1 if ph_ot_backward will be called. PH_ERROR_UNSUPPORTED for what the backend cannot do. */
PH_API ph_ot_batch* ph_ot_batch_create(ph_device* device, uint32_t problems, const uint32_t* rows,
                                       const uint32_t* columns, uint32_t dtype, uint32_t dimension,
                                       uint32_t streaming, uint32_t backward, int32_t* status, char* error,
                                       uint32_t error_bytes);
PH_API int32_t ph_ot_batch_destroy(ph_device* device, ph_ot_batch* batch, char* error, uint32_t error_bytes);
/* Sets the options, and those that are a problem's own: each NULL, or host memory [problems]. */
PH_API int32_t ph_ot_batch_set(ph_device* device, ph_ot_batch* batch, const ph_ot_options* options,
                               const double* epsilons, const double* tolerances, const int32_t* iterations,
                               char* error, uint32_t error_bytes);
/* Sets the inputs, which must live as long as they are used: cost, or points x [rows, dimension] and y [columns, dimension];
 * masses a and b, or NULL: 1 / n and 1 / m. */
PH_API int32_t ph_ot_batch_bind(ph_device* device, ph_ot_batch* batch, const ph_buffer* cost,
                                uint64_t cost_offset, const ph_buffer* x, uint64_t x_offset,
                                const ph_buffer* y, uint64_t y_offset, const ph_buffer* a, uint64_t a_offset,
                                const ph_buffer* b, uint64_t b_offset, char* error, uint32_t error_bytes);

/* Solves the problems that are bound. warm_g: NULL, or where g starts; else at 0. f, g, plan: each may be NULL. reports:
 * ph_ot_report [problems]. */
PH_API int32_t ph_ot_sinkhorn(ph_device* device, ph_ot_batch* batch, const ph_buffer* warm_g,
                              uint64_t warm_g_offset, ph_buffer* f, uint64_t f_offset, ph_buffer* g,
                              uint64_t g_offset, ph_buffer* plan, uint64_t plan_offset, ph_buffer* reports,
                              uint64_t reports_offset, char* error, uint32_t error_bytes);
/* Solves the problems that are bound exactly, without entropy: min <T, C>, by shortest augmenting paths, which take time
 * of the order of (n + m) n m. masses: NULL, or host memory [problems]: how much to transport (partial transport: T1 <= a,
 * T'1 <= b, which may have any totals), above 0 and at most the lesser of their totals. Balanced otherwise: penalties,
 * epsilons and iterations do not count. f and g are dual potentials: f_i + g_j <= C_ij, with equality where T_ij > 0;
 * reports: iterations are augmentations, marginal_error is that of rounding (of partial transport, of the mass), value is the
 * cost and epsilon 0. PH_OT_INFEASIBLE where no plan of finite cost exists. PH_ERROR_UNSUPPORTED where streaming, and on CUDA
 * for problems of more than 512 rows or columns. There, in doubles as well, T has at most n + m - 1 entries above 0, and
 * 64 * (n + m) augmentations, many times what searches need, end a problem with PH_OT_ITERATION_LIMIT; the batch's first call
 * allocates 4 bytes a problem, 8 more where masses are given, and 8 bytes for every pair of points.
 * Only detached and envelope gradients exist: T does not change with small changes of C. */
PH_API int32_t ph_ot_exact(ph_device* device, ph_ot_batch* batch, const double* masses, ph_buffer* f,
                           uint64_t f_offset, ph_buffer* g, uint64_t g_offset, ph_buffer* plan,
                           uint64_t plan_offset, ph_buffer* reports, uint64_t reports_offset, char* error,
                           uint32_t error_bytes);
/* Transports a part of the mass, with entropy: T = argmin <T, C> - epsilon * H(T) so that T1 <= a, T'1 <= b, which may have any
 * totals, and the total of T is masses[p], host memory [problems], above 0 and at most the lesser of their totals. By
 * maximising the dual over f <= 0 and the price lambda of the total, then over g <= 0 and lambda; T = exp((f + g + lambda - C) / epsilon), and f +
 * lambda is what f is written as. marginal_error: sum |T1 - a| over the rows whose f is below 0, which are used up, and what
 * is too much of the others; likewise columns. Penalties, relaxation and scaling do not count. PH_OT_INFEASIBLE where all costs
 * between masses are infinite. Computed in doubles. PH_ERROR_UNSUPPORTED where streaming, and on CUDA for problems of more than
 * 512 rows or columns; what the batch's first call allocates there is ph_ot_exact's. The envelope is exact for the value with respect
 * to costs and points; there are no implicit gradients, nor any of masses. */
PH_API int32_t ph_ot_partial(ph_device* device, ph_ot_batch* batch, const double* masses, ph_buffer* f,
                             uint64_t f_offset, ph_buffer* g, uint64_t g_offset, ph_buffer* plan,
                             uint64_t plan_offset, ph_buffer* reports, uint64_t reports_offset, char* error,
                             uint32_t error_bytes);
/* Approaches the exact solution by proximal points (IPOT, arXiv 1802.04307): T_k = argmin <T, C> + epsilon KL(T | T_(k-1)),
 * each by `inner` of Sinkhorn's iterations, at least 1; the batch's iterations are the most k. Converged where the marginal
 * error is at most the tolerance, and <T, C> is certainly within tolerance * (total mass) * (largest finite |cost|) of the
 * least cost. The epsilon that is reported is epsilon / k, for which f and g are potentials of T. PH_ERROR_UNSUPPORTED where
 * streaming, with penalties, and on CUDA for problems that do not lie on chip: of up to 64 columns they may have 2,048 rows
 * there, of up to 128 columns 1,024, and of up to 512 columns 512 (before sm_90 an eighth). */
PH_API int32_t ph_ot_proximal(ph_device* device, ph_ot_batch* batch, uint32_t inner, ph_buffer* f,
                              uint64_t f_offset, ph_buffer* g, uint64_t g_offset, ph_buffer* plan,
                              uint64_t plan_offset, ph_buffer* reports, uint64_t reports_offset, char* error,
                              uint32_t error_bytes);

/* How a problem of ph_ot_gromov ended: converged, at the iteration limit with a gap above what the tolerance allows, or
 * without an answer, which leaves a plan of 0 and NaN here. */
typedef struct ph_ot_gromov_report {
  uint32_t status; /* ph_ot_status */
  uint32_t iterations;
  uint64_t place;
  double marginal_error; /* sum |T1 - a| + sum |T'1 - b|: rounding */
  double value;          /* (1 - alpha) * cost + alpha * distortion */
  double cost;           /* <T, C>; 0 where there is no C */
  double distortion;     /* sum (X_ik - Y_jl)^2 T_ij T_kl */
  double gap;            /* the most that <gradient, T - S> is for any plan S: 0 where T is stationary */
  double bound;          /* the value is certainly not below: where equal, T is a global minimum */
} ph_ot_gromov_report;

/* Fused Gromov-Wasserstein transport of squared loss, between the symmetric matrices x [n, n] and y [m, m] of each problem
 * (distances or any similarities within each side; those of one problem after another are a tensor):
 *
 *   T = argmin (1 - alpha) <T, C> + alpha sum (X_ik - Y_jl)^2 T_ij T_kl so that T1 = a, T'1 = b
 *
 * which is not convex: a local minimum is found, by conditional gradients with exact line search, exact transport for their
 * directions (arXiv 1805.09114), from the plan of Memoli's third lower bound, and then, unless that bound is reached, from
 * a b'; the better is kept. Stops where the gap is at most tolerance * A * ((1 - alpha) max |C| + alpha * A * max(|X|, |Y|)^2),
 * A the total of a. Iterations and tolerances are the batch's, which is of costs; what else is set or bound does not count.
 * alphas: host memory [problems], in [0, 1]. cost: NULL, for alphas of 1, or [entries], +infinity where nothing may go. a, b:
 * NULL, or as ph_ot_batch_bind's. plan: NULL or [entries]. reports: ph_ot_gromov_report [problems]. Computed in doubles.
 * PH_ERROR_UNSUPPORTED on CUDA for problems of more than 512 rows or columns; the batch's first call allocates up to 512 MiB
 * there, about 10 (n^2 + m^2) + 40 n m bytes for every problem that is solved at once. */
PH_API int32_t ph_ot_gromov(ph_device* device, ph_ot_batch* batch, const double* alphas, const ph_buffer* x,
                            uint64_t x_offset, const ph_buffer* y, uint64_t y_offset, const ph_buffer* cost,
                            uint64_t cost_offset, const ph_buffer* a, uint64_t a_offset, const ph_buffer* b,
                            uint64_t b_offset, ph_buffer* plan, uint64_t plan_offset, ph_buffer* reports,
                            uint64_t reports_offset, char* error, uint32_t error_bytes);

/* The plans of potentials, with the epsilons of the reports. float32 potentials know a plan to |f| / epsilon * 6e-8. */
PH_API int32_t ph_ot_plan(ph_device* device, ph_ot_batch* batch, const ph_buffer* f, uint64_t f_offset,
                          const ph_buffer* g, uint64_t g_offset, const ph_buffer* reports,
                          uint64_t reports_offset, ph_buffer* plan, uint64_t plan_offset, char* error,
                          uint32_t error_bytes);
/* out[rows, width] = T matrix[columns, width], or transposed: out[columns, width] = T' matrix[rows, width]; normalised: rows
 * of out are divided by their total mass in T. plan: NULL, or what ph_ot_sinkhorn or ph_ot_plan wrote. */
PH_API int32_t ph_ot_plan_product(ph_device* device, ph_ot_batch* batch, const ph_buffer* f,
                                  uint64_t f_offset, const ph_buffer* g, uint64_t g_offset,
                                  const ph_buffer* plan, uint64_t plan_offset, const ph_buffer* reports,
                                  uint64_t reports_offset, const ph_buffer* matrix, uint64_t matrix_offset,
                                  ph_buffer* out, uint64_t out_offset, uint32_t width, uint32_t transposed,
                                  uint32_t normalised, char* error, uint32_t error_bytes);

/* Gradients of a loss L(T, <T, C>, value, f, g). Epsilon counts as a constant, even where it is relative.
 *   implicit  exact where the problem converged, whatever the loss, and regardless of the iterations it took. With
 *             G = dL/dT + d_cost * C, u = d_f + (T o G) 1 / epsilon, v = d_g + (T o G)' 1 / epsilon (less their part along
 *             (1, -1)): [diag T1, T; T', diag T'1] [alpha; beta] = [u; v], pinned, without massless rows and columns;
 *             dL/dC = (d_cost + d_value) T + T o (alpha 1' + 1 beta' - G / epsilon), dL/da = d_value f + epsilon alpha,
 *             dL/db = d_value g + epsilon beta, up to a shift (c, -c). Finite penalties change the diagonal.
 *   envelope  T is a constant: dL/dC = (d_cost + d_value) T, dL/da = d_value f, dL/db = d_value g. Exact for the value
 *             alone; not for <T, C>, which takes implicit. d_plan, d_f and d_g must be NULL.
 *   unrolled  of the iterations that were made, whether converged or not. PH_ERROR_UNSUPPORTED where streaming, and on CUDA
 *             for problems that do not lie on chip, see ph_ot_proximal; the batch's first call allocates up to 32 MiB there.
 *   detached  as envelope, but dL/da = dL/db = 0, and d_plan, d_f and d_g count for nothing. */
enum ph_ot_gradient { PH_OT_IMPLICIT = 0, PH_OT_ENVELOPE = 1, PH_OT_UNROLLED = 2, PH_OT_DETACHED = 3 };

/* Gradients with respect to what is bound, from those with respect to the results of ph_ot_sinkhorn; any may be NULL but f,
 * g and reports. d_plan [entries], d_f [rows], d_g [columns], d_cost and d_value [problems]; grad_cost [entries], grad_x
 * [rows, dimension], grad_y [columns, dimension], grad_a [rows], grad_b [columns]. warm_g: as it was, for unrolled. Where
 * streaming, d_plan and grad_cost must be NULL. Pairs of infinite cost, problems without an answer, masses of 0, and points
 * where a cost has no derivative, have gradient 0. */
PH_API int32_t ph_ot_backward(ph_device* device, ph_ot_batch* batch, uint32_t mode, const ph_buffer* f,
                              uint64_t f_offset, const ph_buffer* g, uint64_t g_offset, const ph_buffer* plan,
                              uint64_t plan_offset, const ph_buffer* reports, uint64_t reports_offset,
                              const ph_buffer* warm_g, uint64_t warm_g_offset, const ph_buffer* d_plan,
                              uint64_t d_plan_offset, const ph_buffer* d_f, uint64_t d_f_offset,
                              const ph_buffer* d_g, uint64_t d_g_offset, const ph_buffer* d_cost,
                              uint64_t d_cost_offset, const ph_buffer* d_value, uint64_t d_value_offset,
                              ph_buffer* grad_cost, uint64_t grad_cost_offset, ph_buffer* grad_x,
                              uint64_t grad_x_offset, ph_buffer* grad_y, uint64_t grad_y_offset,
                              ph_buffer* grad_a, uint64_t grad_a_offset, ph_buffer* grad_b,
                              uint64_t grad_b_offset, char* error, uint32_t error_bytes);

/* ---- graph: what learning on graphs computes, forward and backward --------------------------------- */
/*
 * Calls only enqueue, allocate nothing, and may be captured. Matrices are float32, dense, row-major; indices are i32. Sizes
 * may be 0 unless it is said: nothing is written then, and empty sums are 0. An output must not overlap an input unless it
 * says so. Where `accumulate` is 1, results are added to what the output holds. Buffers that may be left out are NULL.
 * Results are the same bits every time; sums are in an order that the sizes alone decide.
 *
 * Offsets [rows + 1] cut a list of entries into one run for each row: row i has [offsets[i], offsets[i + 1]). An index that is
 * no row of what it points into gives NaN; offsets beyond the entries are cut, and those that fall give any values.
 *
 * Backward functions write the gradient of a loss with respect to their inputs, given dy, the one with respect to the output.
 */

/* out[rows, columns] = op(a)[rows, inner] . op(b)[inner, columns] + bias[columns]; op(m) is m, or its transposed one where
 * transpose_m is 1, which lies in memory as [inner, rows] or [columns, inner]. */
PH_API int32_t ph_graph_multiply(ph_device* device, const ph_buffer* a, uint64_t a_offset,
                                 uint32_t transpose_a, const ph_buffer* b, uint64_t b_offset,
                                 uint32_t transpose_b, const ph_buffer* bias, uint64_t bias_offset,
                                 ph_buffer* out, uint64_t out_offset, uint32_t rows, uint32_t inner,
                                 uint32_t columns, uint32_t accumulate, char* error, uint32_t error_bytes);

/* A sparse matrix times a dense one; also gathers rows, and sums segments or takes their mean:
 * out[i, c] = row_scale[i] * (self * column_scale[i] * x[i, c] + sum of weights[e(p), head(c)] * column_scale[j(p)] * x[j(p), c]
 * over the entries p of row i), with j(p) = columns[p], or p without columns, and e(p) = edges[p], or p without edges.
 * x [x_rows, width]; offsets [rows + 1], or NULL: row i has the entry i alone, and there are `rows` entries; columns, edges
 * [entries]; weights [weight_rows, heads], or NULL: 1; head(c) = c / (width / heads); row_scale [rows], column_scale [x_rows],
 * or NULL: 1; out [rows, width]. width is a multiple of heads, at least 1; rows = x_rows unless self is 0. */
PH_API int32_t ph_graph_aggregate(ph_device* device, const ph_buffer* x, uint64_t x_offset,
                                  const ph_buffer* offsets, uint64_t offsets_offset, const ph_buffer* columns,
                                  uint64_t columns_offset, const ph_buffer* edges, uint64_t edges_offset,
                                  const ph_buffer* weights, uint64_t weights_offset,
                                  const ph_buffer* row_scale, uint64_t row_scale_offset,
                                  const ph_buffer* column_scale, uint64_t column_scale_offset, ph_buffer* out,
                                  uint64_t out_offset, uint32_t rows, uint32_t x_rows, uint32_t entries,
                                  uint32_t weight_rows, uint32_t heads, uint32_t width, float self,
                                  uint32_t accumulate, char* error, uint32_t error_bytes);
/* The gradient of weights without edges: out[p, h] = row_scale[i] * column_scale[j(p)] * the sum of y[i, c] * x[j(p), c] over
 * the channels c of head h, for the entries p of each row i. y [rows, width] is dy; out [entries, heads]; otherwise as
 * ph_graph_aggregate, with offsets. */
PH_API int32_t ph_graph_edge_dot(ph_device* device, const ph_buffer* y, uint64_t y_offset, const ph_buffer* x,
                                 uint64_t x_offset, const ph_buffer* offsets, uint64_t offsets_offset,
                                 const ph_buffer* columns, uint64_t columns_offset,
                                 const ph_buffer* row_scale, uint64_t row_scale_offset,
                                 const ph_buffer* column_scale, uint64_t column_scale_offset, ph_buffer* out,
                                 uint64_t out_offset, uint32_t rows, uint32_t x_rows, uint32_t entries,
                                 uint32_t heads, uint32_t width, uint32_t accumulate, char* error,
                                 uint32_t error_bytes);

/* The entries of a sparse matrix of full blocks, of which block o has the rows from row_offsets[o] to row_offsets[o + 1] and the
 * columns likewise: one after another from entry_offsets[o] on, row by row. columns[p] is the column of entry p. For the
 * transposed matrix, whose blocks lie at the same places column by column: rows[q] is the row of its entry q, order[q] the
 * entry p that it is, and inverse[p] = q. All offsets [blocks + 1]; all else [entries]. A block that its entries have no room
 * for is left out. */
PH_API int32_t ph_graph_full_blocks(ph_device* device, const ph_buffer* row_offsets,
                                    uint64_t row_offsets_offset, const ph_buffer* column_offsets,
                                    uint64_t column_offsets_offset, const ph_buffer* entry_offsets,
                                    uint64_t entry_offsets_offset, ph_buffer* columns,
                                    uint64_t columns_offset, ph_buffer* rows, uint64_t rows_offset,
                                    ph_buffer* order, uint64_t order_offset, ph_buffer* inverse,
                                    uint64_t inverse_offset, uint32_t blocks, uint32_t entries, char* error,
                                    uint32_t error_bytes);

/* out[i, c] = the largest x[p, c] of the entries p of row i, places[i, c] the first p that has it; 0 and -1 without entries.
 * x [x_rows, width]; offsets [rows + 1], of x_rows entries; out, places [rows, width]. A NaN is larger than all. */
PH_API int32_t ph_graph_segment_max(ph_device* device, const ph_buffer* x, uint64_t x_offset,
                                    const ph_buffer* offsets, uint64_t offsets_offset, ph_buffer* out,
                                    uint64_t out_offset, ph_buffer* places, uint64_t places_offset,
                                    uint32_t rows, uint32_t x_rows, uint32_t width, char* error,
                                    uint32_t error_bytes);
/* dx[places[i, c], c] = dy[i, c], and 0 elsewhere; dx [x_rows, width], dy [rows, width]. */
PH_API int32_t ph_graph_segment_max_backward(ph_device* device, const ph_buffer* dy, uint64_t dy_offset,
                                             const ph_buffer* places, uint64_t places_offset, ph_buffer* dx,
                                             uint64_t dx_offset, uint32_t rows, uint32_t x_rows,
                                             uint32_t width, uint32_t accumulate, char* error,
                                             uint32_t error_bytes);

/* out[p, c] = exp(x[p, c]) / the sum of exp(x[q, c]) over the entries q of p's row; x, out [x_rows, width]; offsets
 * [rows + 1] must cover all x_rows entries. */
PH_API int32_t ph_graph_segment_softmax(ph_device* device, const ph_buffer* x, uint64_t x_offset,
                                        const ph_buffer* offsets, uint64_t offsets_offset, ph_buffer* out,
                                        uint64_t out_offset, uint32_t rows, uint32_t x_rows, uint32_t width,
                                        char* error, uint32_t error_bytes);
/* dx from y, the output, and dy. */
PH_API int32_t ph_graph_segment_softmax_backward(ph_device* device, const ph_buffer* y, uint64_t y_offset,
                                                 const ph_buffer* dy, uint64_t dy_offset,
                                                 const ph_buffer* offsets, uint64_t offsets_offset,
                                                 ph_buffer* dx, uint64_t dx_offset, uint32_t rows,
                                                 uint32_t x_rows, uint32_t width, uint32_t accumulate,
                                                 char* error, uint32_t error_bytes);

/* out[i, h] = the sum of x[i, h, c] * a[h, c] over c; x [rows, heads, width], a [heads, width], out [rows, heads]. */
PH_API int32_t ph_graph_head_dot(ph_device* device, const ph_buffer* x, uint64_t x_offset, const ph_buffer* a,
                                 uint64_t a_offset, ph_buffer* out, uint64_t out_offset, uint32_t rows,
                                 uint32_t heads, uint32_t width, char* error, uint32_t error_bytes);
/* dx[i, h, c] = dy[i, h] * a[h, c]; da[h, c] = the sum of dy[i, h] * x[i, h, c] over i. Either may be NULL. */
PH_API int32_t ph_graph_head_dot_backward(ph_device* device, const ph_buffer* x, uint64_t x_offset,
                                          const ph_buffer* a, uint64_t a_offset, const ph_buffer* dy,
                                          uint64_t dy_offset, ph_buffer* dx, uint64_t dx_offset,
                                          uint32_t accumulate_dx, ph_buffer* da, uint64_t da_offset,
                                          uint32_t accumulate_da, uint32_t rows, uint32_t heads,
                                          uint32_t width, char* error, uint32_t error_bytes);

enum ph_graph_activation {
  PH_GRAPH_RELU = 0,       /* max(x, 0) */
  PH_GRAPH_LEAKY_RELU = 1, /* x, or slope * x below 0 */
  PH_GRAPH_GELU = 2,       /* x * (1 + erf(x / sqrt(2))) / 2 */
  PH_GRAPH_TANH = 3,
  PH_GRAPH_SIGMOID = 4, /* 1 / (1 + exp(-x)) */
  PH_GRAPH_SOFTPLUS = 5 /* log(1 + exp(x)) */
};
/* out[i] = the activation of x[i], i < count; out may be x. `activation` is a ph_graph_activation. */
PH_API int32_t ph_graph_activate(ph_device* device, uint32_t activation, float slope, const ph_buffer* x,
                                 uint64_t x_offset, ph_buffer* out, uint64_t out_offset, uint64_t count,
                                 char* error, uint32_t error_bytes);
/* dx[i] = dy[i] * the derivative at x[i]; dx may be dy. */
PH_API int32_t ph_graph_activate_backward(ph_device* device, uint32_t activation, float slope,
                                          const ph_buffer* x, uint64_t x_offset, const ph_buffer* dy,
                                          uint64_t dy_offset, ph_buffer* dx, uint64_t dx_offset,
                                          uint64_t count, uint32_t accumulate, char* error,
                                          uint32_t error_bytes);

/* out[i] = alpha * x[i] + beta * y[i], i < count; without y, alpha * x[i]. out may be x or y. */
PH_API int32_t ph_graph_combine(ph_device* device, float alpha, const ph_buffer* x, uint64_t x_offset,
                                float beta, const ph_buffer* y, uint64_t y_offset, ph_buffer* out,
                                uint64_t out_offset, uint64_t count, char* error, uint32_t error_bytes);

/* out[i] = x[i] * y[i], i < count. */
PH_API int32_t ph_graph_product(ph_device* device, const ph_buffer* x, uint64_t x_offset, const ph_buffer* y,
                                uint64_t y_offset, ph_buffer* out, uint64_t out_offset, uint64_t count,
                                uint32_t accumulate, char* error, uint32_t error_bytes);

/* out[i, c] = x[i, c] for c < columns; rows of x start x_stride elements apart, those of out out_stride. Offsets must be
 * multiples of 4 bytes. */
PH_API int32_t ph_graph_copy_columns(ph_device* device, const ph_buffer* x, uint64_t x_offset,
                                     uint32_t x_stride, ph_buffer* out, uint64_t out_offset,
                                     uint32_t out_stride, uint32_t rows, uint32_t columns,
                                     uint32_t accumulate, char* error, uint32_t error_bytes);

/* out[c] = the sum of x[i, c] over i; x [rows, width]. */
PH_API int32_t ph_graph_column_sum(ph_device* device, const ph_buffer* x, uint64_t x_offset, ph_buffer* out,
                                   uint64_t out_offset, uint32_t rows, uint32_t width, uint32_t accumulate,
                                   char* error, uint32_t error_bytes);

/* out[i, c] = (x[i, c] - mean[c]) / sqrt(variance[c] + epsilon) * weight[c] + bias[c] (Ioffe and Szegedy, 2015). While
 * training, mean and variance are those of x's columns, over rows, and running = (1 - momentum) * running + momentum * theirs,
 * the variance there over rows - 1; else they are the running ones. saved [2, width] holds mean and 1 / sqrt(variance +
 * epsilon) for backward. */
PH_API int32_t ph_graph_batch_norm(ph_device* device, const ph_buffer* x, uint64_t x_offset,
                                   const ph_buffer* weight, uint64_t weight_offset, const ph_buffer* bias,
                                   uint64_t bias_offset, ph_buffer* running_mean,
                                   uint64_t running_mean_offset, ph_buffer* running_variance,
                                   uint64_t running_variance_offset, ph_buffer* saved, uint64_t saved_offset,
                                   ph_buffer* out, uint64_t out_offset, uint32_t rows, uint32_t width,
                                   float epsilon, float momentum, uint32_t training, char* error,
                                   uint32_t error_bytes);
/* After training: dx, and what is added to dweight and dbias; each may be NULL. accumulate is dx's. */
PH_API int32_t ph_graph_batch_norm_backward(
    ph_device* device, const ph_buffer* x, uint64_t x_offset, const ph_buffer* weight, uint64_t weight_offset,
    const ph_buffer* saved, uint64_t saved_offset, const ph_buffer* dy, uint64_t dy_offset, ph_buffer* dx,
    uint64_t dx_offset, ph_buffer* dweight, uint64_t dweight_offset, ph_buffer* dbias, uint64_t dbias_offset,
    uint32_t rows, uint32_t width, uint32_t accumulate, char* error, uint32_t error_bytes);
/* The same over each row (Ba et al., 2016); saved [2, rows]. */
PH_API int32_t ph_graph_layer_norm(ph_device* device, const ph_buffer* x, uint64_t x_offset,
                                   const ph_buffer* weight, uint64_t weight_offset, const ph_buffer* bias,
                                   uint64_t bias_offset, ph_buffer* saved, uint64_t saved_offset,
                                   ph_buffer* out, uint64_t out_offset, uint32_t rows, uint32_t width,
                                   float epsilon, char* error, uint32_t error_bytes);
PH_API int32_t ph_graph_layer_norm_backward(
    ph_device* device, const ph_buffer* x, uint64_t x_offset, const ph_buffer* weight, uint64_t weight_offset,
    const ph_buffer* saved, uint64_t saved_offset, const ph_buffer* dy, uint64_t dy_offset, ph_buffer* dx,
    uint64_t dx_offset, ph_buffer* dweight, uint64_t dweight_offset, ph_buffer* dbias, uint64_t dbias_offset,
    uint32_t rows, uint32_t width, uint32_t accumulate, char* error, uint32_t error_bytes);

/* out[i] = 0 with a probability, 0 to below 1, else x[i] / (1 - probability), i < count, at most 2^34. Element i goes if word
 * i % 4 of Philox4x32-10 for the counter (i / 4, 0, 0, 0) and the key `seed` is below probability * 2^32. It is its own
 * backward function. out may be x. */
PH_API int32_t ph_graph_dropout(ph_device* device, const ph_buffer* x, uint64_t x_offset, ph_buffer* out,
                                uint64_t out_offset, uint64_t count, float probability, uint64_t seed,
                                uint32_t accumulate, char* error, uint32_t error_bytes);

/* loss[0] = scale * the sum of log(sum of exp(logits[row])) - logits[row, labels[row]] over the rows whose label is not
 * negative, in nats; NaN for a label that is no class. probabilities [rows, classes] are the softmax, for backward;
 * row_losses f32 [rows], 0 for rows without label, and predictions i32 [rows], the first largest logit, may be NULL. classes
 * is at least 1. */
PH_API int32_t ph_graph_cross_entropy(ph_device* device, const ph_buffer* logits, uint64_t logits_offset,
                                      const ph_buffer* labels, uint64_t labels_offset,
                                      ph_buffer* probabilities, uint64_t probabilities_offset,
                                      ph_buffer* loss, uint64_t loss_offset, ph_buffer* row_losses,
                                      uint64_t row_losses_offset, ph_buffer* predictions,
                                      uint64_t predictions_offset, uint32_t rows, uint32_t classes,
                                      float scale, char* error, uint32_t error_bytes);
/* dx [rows, classes], for dy [1]. */
PH_API int32_t ph_graph_cross_entropy_backward(ph_device* device, const ph_buffer* probabilities,
                                               uint64_t probabilities_offset, const ph_buffer* labels,
                                               uint64_t labels_offset, const ph_buffer* dy,
                                               uint64_t dy_offset, ph_buffer* dx, uint64_t dx_offset,
                                               uint32_t rows, uint32_t classes, float scale,
                                               uint32_t accumulate, char* error, uint32_t error_bytes);

/* out[0] = the sum of x[i] * x[i], i < count. */
PH_API int32_t ph_graph_squared_norm(ph_device* device, const ph_buffer* x, uint64_t x_offset, ph_buffer* out,
                                     uint64_t out_offset, uint64_t count, char* error, uint32_t error_bytes);

/* A step of Adam (Kingma and Ba, 2015), or of AdamW (Loshchilov and Hutter, 2019) where `decoupled` is 1: with g the
 * gradient, times most_norm / sqrt(squared_norm[0]) where that is above most_norm (squared_norm may be NULL: never), plus
 * weight_decay * parameter for Adam; first = beta1 * first + (1 - beta1) * g; second = beta2 * second + (1 - beta2) * g * g;
 * parameter -= learning_rate * (first / correction1) / (sqrt(second / correction2) + epsilon), after parameter -= learning_rate
 * * weight_decay * parameter for AdamW. correctionN is 1 - betaN^step. All f32 [count]. */
PH_API int32_t ph_graph_adam(ph_device* device, ph_buffer* parameters, uint64_t parameters_offset,
                             const ph_buffer* gradients, uint64_t gradients_offset, ph_buffer* first,
                             uint64_t first_offset, ph_buffer* second, uint64_t second_offset,
                             const ph_buffer* squared_norm, uint64_t squared_norm_offset, uint64_t count,
                             float learning_rate, float beta1, float beta2, float epsilon, float weight_decay,
                             float correction1, float correction2, float most_norm, uint32_t decoupled,
                             char* error, uint32_t error_bytes);

#ifdef __cplusplus
}
#endif

#endif /* PACKHORSE_H */
