"""The cluster manager: who is in the cluster, which targets serve, and how everyone learns it.

states.py    pure core: public states of a chain's targets from what is known of them locally
tables.py    pure core: balanced chain tables
lease.py     pure core: who is the primary manager
liveness.py  pure core: which nodes and clients are alive
registry.py  the manager's records in the KV store, each write fenced by the lease
routing.py   RoutingInfo from the records
manager.py   the primary's state: changes, one at a time, and who waits for them
service.py   the Manager service of cluster.proto
server.py    the process: `serve(config)`
config.py    its configuration
"""
