// Decode attention for heads of 96 channels.
#include "attention/decode_kernel.cuh"

namespace ph::attention {

template void launch_decode<96>(const ph_device&, const DecodeParameters&, uint32_t);

}  // namespace ph::attention
