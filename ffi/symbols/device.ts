const BUFFER_UPLOAD = {
  name: "ph_buffer_upload",
  parameters: [
    "pointer", // ph_device* device
    "pointer", // ph_buffer* buffer
    "u64", // uint64_t offset
    "buffer", // const void* source
    "u64", // uint64_t bytes
    "buffer", // char* error
    "u32", // uint32_t error_bytes
  ],
  result: "i32",
} as const;

const BUFFER_DOWNLOAD = {
  name: "ph_buffer_download",
  parameters: [
    "pointer", // ph_device* device
    "pointer", // const ph_buffer* buffer
    "u64", // uint64_t offset
    "buffer", // void* target
    "u64", // uint64_t bytes
    "buffer", // char* error
    "u32", // uint32_t error_bytes
  ],
  result: "i32",
} as const;

const DEVICE_SYNCHRONIZE = {
  name: "ph_device_synchronize",
  parameters: [
    "pointer", // ph_device* device
    "buffer", // char* error
    "u32", // uint32_t error_bytes
  ],
  result: "i32",
} as const;

const READBACK_WAIT = {
  name: "ph_readback_wait",
  parameters: [
    "pointer", // ph_device* device
    "pointer", // ph_readback* readback
    "buffer", // void* target
    "u64", // uint64_t bytes
    "buffer", // char* error
    "u32", // uint32_t error_bytes
  ],
  result: "i32",
} as const;

/** `packhorse.h`, section "device". Names in `_async` run on another thread and give a promise. */
export const DEVICE_SYMBOLS = {
  ph_device_count: { parameters: [], result: "u32" },
  ph_device_open: {
    parameters: [
      "u32", // uint32_t ordinal
      "buffer", // int32_t* status
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "pointer", // ph_device*
  },
  ph_device_open_on_stream: {
    parameters: [
      "u32", // uint32_t ordinal
      "u64", // uint64_t stream
      "buffer", // int32_t* status
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "pointer", // ph_device*
  },
  ph_device_stream: {
    parameters: [
      "pointer", // ph_device* device
      "buffer", // uint64_t* stream
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_device_close: {
    parameters: [
      "pointer", // ph_device* device
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_device_get_info: {
    parameters: [
      "pointer", // ph_device* device
      "buffer", // ph_device_info* info
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_device_synchronize: DEVICE_SYNCHRONIZE,
  ph_device_synchronize_async: { ...DEVICE_SYNCHRONIZE, nonblocking: true },
  ph_buffer_create: {
    parameters: [
      "pointer", // ph_device* device
      "u64", // uint64_t bytes
      "buffer", // int32_t* status
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "pointer", // ph_buffer*
  },
  ph_buffer_wrap: {
    parameters: [
      "pointer", // ph_device* device
      "u64", // uint64_t address
      "u64", // uint64_t bytes
      "buffer", // int32_t* status
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "pointer", // ph_buffer*
  },
  ph_buffer_address: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // const ph_buffer* buffer
      "buffer", // uint64_t* address
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_buffer_destroy: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_buffer* buffer
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_buffer_upload: BUFFER_UPLOAD,
  ph_buffer_upload_async: { ...BUFFER_UPLOAD, nonblocking: true },
  ph_buffer_download: BUFFER_DOWNLOAD,
  ph_buffer_download_async: { ...BUFFER_DOWNLOAD, nonblocking: true },
  ph_readback_create: {
    parameters: [
      "pointer", // ph_device* device
      "u64", // uint64_t bytes
      "buffer", // int32_t* status
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "pointer", // ph_readback*
  },
  ph_readback_destroy: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_readback* readback
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_readback_enqueue: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_readback* readback
      "pointer", // const ph_buffer* buffer
      "u64", // uint64_t offset
      "u64", // uint64_t bytes
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_readback_wait: READBACK_WAIT,
  ph_readback_wait_async: { ...READBACK_WAIT, nonblocking: true },
  ph_buffer_copy: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_buffer* target
      "u64", // uint64_t target_offset
      "pointer", // const ph_buffer* source
      "u64", // uint64_t source_offset
      "u64", // uint64_t bytes
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_buffer_fill: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // ph_buffer* buffer
      "u64", // uint64_t offset
      "u32", // uint32_t value
      "u64", // uint64_t bytes
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_buffer_read: {
    parameters: [
      "pointer", // ph_device* device
      "pointer", // const ph_buffer* buffer
      "u64", // uint64_t offset
      "u64", // uint64_t bytes
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_device_timer_begin: {
    parameters: [
      "pointer", // ph_device* device
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
  ph_device_timer_end: {
    parameters: [
      "pointer", // ph_device* device
      "buffer", // float* milliseconds
      "buffer", // char* error
      "u32", // uint32_t error_bytes
    ],
    result: "i32",
  },
} as const satisfies Deno.ForeignLibraryInterface;
