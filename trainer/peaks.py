"""What a device could do at best: the peaks that utilisation (MFU) and predictions are stated against. Imports nothing."""

# Dense matrix FLOP/s of one device without sparsity (fp32: TF32 on tensor cores, on V100 plain fp32); first match of the name wins.
# From NVIDIA's data sheets: DGX B200 (2024), H200 (2024), H100 (2023: SXM, PCIe, NVL), L40S (2023), A100 (2022), V100 (2020);
# where a sheet gives the sparse figure, half of it.
PEAK_FLOPS = (
    ("B200", {"fp32": 1.125e15, "bf16": 2.25e15, "fp16": 2.25e15}),
    ("H200", {"fp32": 494.7e12, "bf16": 989.4e12, "fp16": 989.4e12}),
    ("H100 NVL", {"fp32": 417.5e12, "bf16": 835.5e12, "fp16": 835.5e12}),
    ("H100 PCIe", {"fp32": 378e12, "bf16": 756e12, "fp16": 756e12}),
    ("H100", {"fp32": 494.7e12, "bf16": 989.4e12, "fp16": 989.4e12}),
    ("L40S", {"fp32": 183e12, "bf16": 362e12, "fp16": 362e12}),
    ("A100", {"fp32": 156e12, "bf16": 312e12, "fp16": 312e12}),
    ("V100", {"fp32": 15.7e12, "fp16": 125e12}),
)

# bytes of device memory, the largest common variant, from the same data sheets
MEMORY_BYTES = (("B200", 180e9), ("H200", 141e9), ("H100", 80e9), ("L40S", 48e9), ("A100", 80e9), ("V100", 32e9))

# bytes/s of device memory, from the same data sheets
MEMORY_BANDWIDTH = (
    ("B200", 8.0e12),
    ("H200", 4.8e12),
    ("H100 NVL", 3.9e12),
    ("H100 PCIe", 2.0e12),
    ("H100", 3.35e12),
    ("L40S", 864e9),
    ("A100", 2.039e12),
    ("V100", 900e9),
)


def peak_bandwidth(device_name: str) -> float | None:
    """Return the bytes/s of the device's memory by its data sheet, or None for a device not in the table."""
    for name, rate in MEMORY_BANDWIDTH:
        if all(word in device_name for word in name.split()):
            return rate
    return None


def peak_flops(device_name: str, activations: str) -> tuple[str, float] | None:
    """Return (name, dense FLOP/s) of the peak that MFU is measured against, or None for a device not in the table."""
    for name, peaks in PEAK_FLOPS:
        if all(word in device_name for word in name.split()) and activations in peaks:
            return f"{name} {activations}", peaks[activations]
    return None
