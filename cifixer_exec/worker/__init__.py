"""What a Celery worker does with doorbells: own sandboxes, run ops, keep its lease, hand over."""
