//! dst: disks of several machines as one Linux block device.
