"""Launchers: start ranks on this machine, or print scripts and manifests for torchrun, SLURM and Kubernetes."""
