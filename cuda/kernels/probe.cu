// A kernel that does nothing, to ask the driver what thread blocks of its kind a device holds.
extern "C" __global__ void probe() {}
