"""The trainer, as the job sees it. Knows nothing of SageMaker or S3."""
