"""Parts of `hosts.py`: a cluster of hosts on one machine."""
