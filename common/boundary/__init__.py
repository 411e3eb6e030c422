"""The four boundaries to the outside world: Clock, Random, Disk, Net. Nothing else in kvfs touches time, chance, disks or sockets."""
