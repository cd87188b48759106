"""promoter changes the disks of virtual machines while they run."""
