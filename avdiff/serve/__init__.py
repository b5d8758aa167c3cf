"""Server: the pipeline behind OpenAI's videos resource, with jobs that outlive the process.

May import the pipelines; needs the extra `avdiff[serve]`. Start with `app`, then `jobs` and
`worker`: the application only takes and tells, workers in processes of their own compute.
"""
