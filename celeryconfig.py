"""Celery's settings, each with its reason. A message is only a doorbell; the journal in Redis holds the truth (docs/adr/0002).

Loaded by ``cifixer_exec.tasks`` (a wheel has it as ``cifixer_exec.celeryconfig``). The broker's address comes from the
environment through ``cifixer_exec.settings``, the only reader of it.
"""

from kombu import Exchange, Queue

from cifixer_exec.queues import MAINTENANCE, pool_queue
from cifixer_exec.settings import AppConfig

_config = AppConfig.from_env()
_exchange = Exchange("sbx", type="direct")
_prefix = f"{_config.namespace}:"

# --- where -----------------------------------------------------------------------------------------------------------
# kombu calls a Unix socket "redis+socket", redis-py calls it "unix".
broker_url = _config.redis_url.replace("unix://", "redis+socket://", 1)
# Raw Celery use (`run_command.delay(...).get()`) needs a result backend; ops themselves answer through streams.
result_backend = broker_url

# --- what travels ------------------------------------------------------------------------------------------------------
task_serializer = "json"
result_serializer = "json"
accept_content = ["json"]  # never pickle: whoever can write to Redis would run code in the worker
result_accept_content = ["json"]

# --- results -------------------------------------------------------------------------------------------------------------
task_ignore_result = True  # two round trips less per doorbell; the tasks for raw use override it
task_store_errors_even_if_ignored = False  # an error is in the journal, in full
result_expires = int(_config.retention_s)  # as long as the journal keeps an op
result_backend_thread_safe = True  # one connection pool per process, not one per thread
result_backend_transport_options = {"global_keyprefix": _prefix}  # the namespace can be purged whole
redis_socket_timeout = 5.0  # the default of 120 s hangs a thread when Redis is cut off
redis_socket_connect_timeout = 3.0
redis_backend_health_check_interval = 10

# --- delivery ----------------------------------------------------------------------------------------------------------
task_acks_late = False  # the journal redelivers; a late ack runs twice after a connection reset or a drain
task_publish_retry_policy = {
    "max_retries": 3,
    "interval_start": 0,
    "interval_step": 0.1,
    "interval_max": 0.5,
}  # op ids make repeats harmless
broker_connection_retry_on_startup = True  # Redis may start after us
broker_connection_max_retries = None  # a worker never gives up on Redis
broker_pool_limit = 32  # publishers in threads
broker_transport_options = {
    "global_keyprefix": _prefix,
    "priority_steps": [0],  # one list per queue: BRPOP names a quarter of the keys
    "visibility_timeout": 60,  # only doorbells that were not started are ever un-acked
    "unacked_restore_interval": 5,  # the defaults scan every 100 s
    "unacked_restore_throttle": 1,
    "unacked_mutex_expire": 10,  # a worker killed while scanning blocks the others this long, not 300 s
    "socket_timeout": 5.0,  # None would wait for ever on a dead connection
    "socket_connect_timeout": 3.0,
    "socket_keepalive": True,
    "health_check_interval": 5,  # a half-open socket is noticed after about 10 s
    "max_connections": 64,
}
if _config.redis_url.startswith("unix://"):
    del broker_transport_options["socket_keepalive"]  # a TCP option, refused for Unix sockets

# --- queues ------------------------------------------------------------------------------------------------------------
# Exchange and routing key are named on every queue: a bare Queue("name") is bound to the default queue's.
task_queues = [Queue(name, _exchange, routing_key=name) for name in (MAINTENANCE, pool_queue(_config.execution_backend))]
task_default_queue = MAINTENANCE
task_default_exchange = "sbx"
task_default_routing_key = MAINTENANCE
task_create_missing_queues = False  # a typo fails instead of making a queue that nobody reads
worker_direct = True  # <node name>.dq2: the session-affinity queue

# --- worker ------------------------------------------------------------------------------------------------------------
worker_pool = "threads"  # ops wait for sandboxes, they do not compute; prefork cannot share channels
worker_concurrency = _config.worker_concurrency  # a thread waits with each running command, so that Flower shows the truth
worker_prefetch_multiplier = 1  # doorbells that wait here are kept from idle peers
worker_disable_prefetch = False  # with early ack it stalls: nothing wakes the hub when a job ends (kombu 5.7)
worker_consumer = "cifixer_exec.worker.steps:PatientConsumer"  # reconnects within 1 s instead of 2, 4, … 30 s
worker_soft_shutdown_timeout = 0  # the drain is ours
worker_send_task_events = False  # three PUBLISH per op on the hub thread: Flower switches it on while it watches
task_send_sent_event = False
task_track_started = False  # a write per op for what the journal knows
worker_hijack_root_logger = False
worker_redirect_stdouts = False
worker_enable_remote_control = True  # Flower and `celery inspect`

# --- beat ----------------------------------------------------------------------------------------------------------------
beat_scheduler = "celery.beat:Scheduler"  # only plain intervals, so there is no state to keep in a file
beat_schedule = {
    "reap": {
        "task": "cifixer_exec.reap",
        "schedule": _config.reap_interval_s,
        # a round that nobody took in time is left out: the next one does the same
        "options": {"queue": MAINTENANCE, "expires": max(1.0, _config.reap_interval_s * 0.9), "ignore_result": True},
    },
}
