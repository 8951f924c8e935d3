/**
 * Devices, CPU or GPU, and buffers in their memory.
 *
 * @module
 */
export type { Backend } from "./backend.ts";
export { measureCopyBandwidth } from "./bandwidth.ts";
export { Device, type DeviceInfo, type DeviceOptions } from "./device.ts";
export { DeviceBuffer } from "./device_buffer.ts";
export type { HostArray, HostArrays } from "./host_array.ts";
export { type BackendReport, probeBackends } from "./probe.ts";
