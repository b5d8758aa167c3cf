"""Schedulers: objects that step a joint denoising run."""

from avdiff.schedulers.joint_flow_match import JointFlowMatchScheduler

__all__ = ["JointFlowMatchScheduler"]
