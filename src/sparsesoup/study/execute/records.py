"""Records of a study's trials, each read from disk once."""

from collections.abc import Iterator, Sequence
from typing import Any

from sparsesoup.study.execute.jobs import FAILED, TrialJob, read_record


class StudyRecords:
    """The record of each trial, or its failure.

    Args:
        jobs: all jobs of the study.
    Raises: UserError for a damaged record.
    """

    def __init__(self, jobs: Sequence[TrialJob]) -> None:
        self._jobs = jobs
        self._found: dict[str, dict[str, Any] | None] = {}
        self._failed: dict[str, dict[str, Any] | None] = {}
        for job in jobs:
            self.reload(job)

    def reload(self, job: TrialJob) -> None:
        """Read record and failure of a job again, which has ended."""
        self._found[job.trial.trial_key] = read_record(job.record_path)
        self._failed[job.trial.trial_key] = read_record(job.failure_path, FAILED)

    def reload_pending(self) -> None:
        """Read those of all jobs again that are not done."""
        for job in self.pending(retry_failed=True):
            self.reload(job)

    def pending(self, retry_failed: bool) -> list[TrialJob]:
        """Return the jobs that are not done: without a record, or not scored on the test split."""
        done = {job.trial.trial_key for job, record in self.items() if record["test"] is not None}
        left = [job for job in self._jobs if job.trial.trial_key not in done]
        return [job for job in left if retry_failed or self._failed[job.trial.trial_key] is None]

    def items(self) -> Iterator[tuple[TrialJob, dict[str, Any]]]:
        """Yield each job that has a record, with it."""
        for job in self._jobs:
            if (record := self._found[job.trial.trial_key]) is not None:
                yield job, record

    @property
    def found(self) -> list[dict[str, Any]]:
        """All records, in the order of the jobs."""
        return [record for _, record in self.items()]

    @property
    def failed_jobs(self) -> list[TrialJob]:
        """All jobs that failed, in their order."""
        return [job for job in self._jobs if self._failed[job.trial.trial_key] is not None]

    @property
    def failed(self) -> list[dict[str, Any]]:
        """All failures, in the order of the jobs."""
        return [failure for job in self._jobs if (failure := self._failed[job.trial.trial_key]) is not None]
