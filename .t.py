from rlaif_ray.config.jobs import TrainJob, EvaluateJob
from rlaif_ray.pipelines.settings import *
def J(**k): return TrainJob.model_validate(k)
b={"feedback":{"type":"judge"}}
k=kept_settings(J(**b))
for c in [dict(learner={"lr":1e-3}),dict(algorithm={"type":"grpo"}),dict(feedback={"type":"reward_model","model":"x"}),dict(evaluation={"harmless":{"prompts":{"path":"x"}}}),dict(steps=200,feedback={"type":"mixture","scorers":{"a":{"scorer":{"type":"judge"}}}}), dict(feedback={"type":"judge","template":"harmless"}),dict(algorithm={"type":"ppo","importance":{}}),dict(rollout={"replicas":4},steps=5)]:
    try: print(list(map(str,changed_settings(k,J(**c),holds="H",anew="A"))))
    except InputError as e: print("REFUSED",e)
k=kept_settings(J(feedback={"type":"mixture","scorers":{"a":{"scorer":{"type":"judge"}}}}))
try: print(changed_settings(k,J(feedback={"type":"mixture","scorers":{"a":{"scorer":{"type":"judge"}},"replicas":{"scorer":{"type":"length","target_tokens":4}}}}),holds="H",anew="A"))
except InputError as e: print("REFUSED",e)
