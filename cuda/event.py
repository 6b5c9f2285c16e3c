"""A point in a stream, to be waited for by the host.

torch's own Event takes 5 us to record where the driver takes 0.6.
"""

from __future__ import annotations

import torch

from zllm.cuda.launcher import check_status


class Event:
    """Recorded any number of times on torch's current stream of `device`; without timing."""

    def __init__(self, device: int) -> None:
        # Imported here, since this module is also read where there is no GPU.
        from cuda.bindings import driver

        self._driver = driver
        self._device = device
        with torch.cuda.device(device):
            torch.cuda.current_stream().synchronize()  # makes the primary context current
            status, self._event = driver.cuEventCreate(
                driver.CUevent_flags.CU_EVENT_DISABLE_TIMING.value
            )
        check_status(status, "an event was not made")

    def record(self) -> None:
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        (status,) = self._driver.cuEventRecord(self._event, stream)
        if status:
            check_status(status, "an event was not recorded")

    def synchronize(self) -> None:
        """Wait until what stood before the last `record` is done; other threads run meanwhile."""
        (status,) = self._driver.cuEventSynchronize(self._event)
        if status:
            check_status(status, "a step ended with an error of the device")

    def __del__(self) -> None:
        if hasattr(self, "_event"):
            self._driver.cuEventDestroy(self._event)
