"""The libraries that the benchmarks measure beside this project, one a file."""
