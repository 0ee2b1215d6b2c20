"""What the driver tells of a GPU while it works: clocks, temperature, power, energy."""

import importlib.util
import time

import torch

LOOK = 0.005  # seconds of calls between two looks at the counter of energy


class Sensors:
    """Readings of one torch.device, None where the driver has none; `reason` says why not."""

    def __init__(self, device):
        self.device, self.handle, self.reason = device, None, None
        if device.type != "cuda":
            self.reason = "not a GPU"
        elif torch.version.hip:
            self.reason = "read on NVIDIA alone"
        elif importlib.util.find_spec("pynvml") is None:
            self.reason = "nvidia-ml-py is not installed"
        else:
            import pynvml

            self.nvml = pynvml
            uuid = torch.cuda.get_device_properties(device).uuid
            try:
                pynvml.nvmlInit()
                self.handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            except pynvml.NVMLError as error:
                self.reason = str(error)

    def _ask(self, function, *args):
        if self.handle is None:
            return None
        try:
            return getattr(self.nvml, function)(self.handle, *args)
        except self.nvml.NVMLError:  # of this card, or in this machine, not told
            return None

    def read(self):
        """{"sm_mhz", "temperature_c", "power_w"}, None where there is no handle."""
        if self.handle is None:
            return None
        power = self._ask("nvmlDeviceGetPowerUsage")
        return {
            "sm_mhz": self._ask("nvmlDeviceGetClockInfo", self.nvml.NVML_CLOCK_SM),
            "temperature_c": self._ask("nvmlDeviceGetTemperature", self.nvml.NVML_TEMPERATURE_GPU),
            "power_w": None if power is None else power / 1e3,
        }

    def driver(self):
        """Its version, or None."""
        if self.handle is None:
            return None
        version = self.nvml.nvmlSystemGetDriverVersion()
        return version.decode() if isinstance(version, bytes) else version

    def joules(self):
        """Since the driver was loaded; None where it does not count."""
        used = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        return None if used is None else used / 1e3

    def energy_of(self, run, call_s, seconds):
        """Joules of one call of about call_s: over calls back to back from where the counter moves,
        which it does some ten times a second, to where it moves after `seconds`. None where it does
        not count, or stands still, or seconds is 0."""
        last = self.joules() if seconds else None
        if last is None:
            return None
        at_once = max(int(LOOK / call_s), 1)
        first, calls, since = None, 0, time.monotonic()
        while (passed := time.monotonic() - since) < 4 * seconds:
            for _ in range(at_once):
                run()
            torch.cuda.synchronize()
            calls += at_once
            if (now := self.joules()) == last:
                continue
            last = now
            if first is None:
                first, calls, since = now, 0, time.monotonic()
            elif passed >= seconds:
                return (now - first) / calls
        return None

    def peak_bytes(self, run):
        """What one call allocates beyond what there was before it; None on a CPU, which keeps no
        count."""
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before
