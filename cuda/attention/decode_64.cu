// Decode attention for heads of 64 channels.
#include "attention/decode_kernel.cuh"

namespace ph::attention {

template void launch_decode<64>(const ph_device&, const DecodeParameters&, uint32_t);

}  // namespace ph::attention
