"""promoter changes the disks of virtual machines while they run."""

__version__ = "0.1.0"
