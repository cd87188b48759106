"""What is seen of one disk: the guest's own graph and jobs, and what the files show."""

from __future__ import annotations

from promoter.blockjob import DRAINED, READY, BlockJob, JobStatus
from promoter.chain import Disk
from promoter.guests.base import GuestView
from promoter.operations.move import Active, DiskIntent, DiskSeen, Job, Target, Way
from promoter.operations.plan import same_files
from promoter.storage.files import stamp
from promoter.storage.images import backing_name
from promoter.storage.names import Named


def observe(intent: DiskIntent, view: GuestView | None) -> DiskSeen:
    """One disk as it is now; ``view`` is None when the guest is gone."""
    disk = view.disk(intent.key) if view else None
    nodes = view.nodes if view else frozenset()
    named = _named(intent, view, disk)
    return DiskSeen(
        active=_active(intent, disk, named),
        job=_job(view.jobs.get(intent.job) if view and _is_ours(intent, disk) else None),
        named=named,
        target=_target(intent),
        attached=bool({intent.mark, f"{intent.mark}-file"} & nodes),
        prepared=intent.way is not Way.COMMIT_BELOW and _is_prepared(intent),
        unchanged=disk is not None and same_files(intent, disk),
    )


def _named(intent: DiskIntent, view: GuestView | None, disk: Disk | None) -> Named:
    if intent.way is Way.COMMIT_BELOW:
        return _in_header(intent, disk)
    if intent.names.defined:
        return _defined(intent, view, disk)
    return intent.names.look(intent.new)


def _in_header(intent: DiskIntent, disk: Disk | None) -> Named:
    """What lies below the layer above the commit, going by that one's header.

    QEMU rewrites it before it changes its graph, and the look at that may have come before.
    """
    if disk and {i.file for i in intent.gone} & {i.file for i in disk.chain}:
        return Named.OLD
    above, top = (intent.chain.images[i].file for i in (intent.top - 1, intent.top))
    assert above, "checked to be a local file"
    assert top, "checked to be a local file"
    found = stamp(above.parent / (backing_name(above) or ""))
    if found == stamp(top):
        return Named.OLD
    return Named.NEW if found == stamp(intent.names.target) else Named.UNKNOWN


def _defined(intent: DiskIntent, view: GuestView | None, disk: Disk | None) -> Named:
    """What a domain's next boot opens, or, where nothing says so, what it has now."""
    files = {str(intent.chain.active.file): Named.OLD, str(intent.names.target): Named.NEW}
    if view and view.defined and (file := view.defined.get(intent.name)):
        return files.get(file, Named.UNKNOWN)
    if disk is None:
        return Named.UNKNOWN if _is_prepared(intent) else Named.OLD
    return Named.NEW if _active(intent, disk, Named.UNKNOWN) is Active.NEW else Named.OLD


def _is_prepared(intent: DiskIntent) -> bool:
    """Could the names change now? Where none has to, the new disk is all that is needed."""
    if intent.names.remote:
        return intent.made
    if intent.names.stays:
        return _target(intent) is not Target.ABSENT
    return intent.names.is_prepared()


def has_made(intent: DiskIntent, view: GuestView) -> bool:
    """Does libvirt copy, or did it, to a target that it has made on the guest's host?"""
    if not intent.names.remote:
        return False
    if (copied_to := _copied_to(view.disk(intent.key))) is not None:
        return copied_to == str(intent.names.target)
    job = view.jobs.get(intent.job)
    return job is not None and job.type == "copy"


def _copied_to(disk: Disk | None) -> str | None:
    return disk.libvirt.mirror if disk and disk.libvirt else None


def _is_ours(intent: DiskIntent, disk: Disk | None) -> bool:
    """Is the disk's job our mirror? libvirt's jobs have no names of ours."""
    return _copied_to(disk) in (None, str(intent.names.target))


def _active(intent: DiskIntent, disk: Disk | None, named: Named) -> Active:
    """What the guest writes to: by node-name in the QEMU that switched, by file in another."""
    if disk is None:
        return Active.ABSENT
    paths, target = {intent.chain.active.file, intent.names.path}, intent.names.target
    nodes, files = {i.node for i in disk.chain}, [i.file for i in disk.chain]
    switched = intent.node in nodes and not nodes & {i.node for i in intent.gone}
    pivoted = (
        intent.names.defined and target in files and not {i.file for i in intent.gone} & {*files}
    )
    rebooted = named is Named.NEW and files != [i.file for i in intent.chain]
    if switched or pivoted or (rebooted and (paths | {target}) & {*files}):
        return Active.NEW
    return Active.OLD if files[0] in paths else Active.OTHER


def _job(job: BlockJob | None) -> Job:
    if job is None or job.status is JobStatus.NULL:
        return Job.NONE
    if job.status is JobStatus.CONCLUDED:
        return Job.FAILED if job.error else Job.DONE
    if job.full:
        return Job.RUNNING  # though QEMU calls it standby when it was ready
    if job.status in DRAINED:
        return Job.PENDING
    return Job.READY if job.status in READY else Job.RUNNING


def _target(intent: DiskIntent) -> Target:
    if intent.commits:
        return Target.LAYER
    if intent.names.remote:
        return Target.USED if intent.made else Target.LAYER
    found = stamp(intent.names.target)
    if intent.seeded and found and found.id == intent.seeded.id:
        return Target.SEEDED if found == intent.seeded else Target.USED
    return Target.USED if intent.part.exists() else Target.ABSENT
