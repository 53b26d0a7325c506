"""What ``benchmarks.reproduce`` measures, how it is kept, and the page that it writes."""
