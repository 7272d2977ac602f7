"""What the server tells of its work: metrics, statistics, traces, the log, and a page for people.

Nothing here decides what a request is answered. Who keeps several processes imports the log and
the port for Prometheus, and so those two know neither models nor gRPC.
"""
