"""Kernels for GPUs, in Triton. Imported only where there is one: torch's builds for GPUs bring Triton along."""
