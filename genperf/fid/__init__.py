"""Features and statistics for `genperf fid`, read from files and folders of images."""
