"""placeholder"""
from dataclasses import dataclass, asdict
import numpy as np
from scipy import stats
@dataclass
class Interval:
    mean: float|None; ci95_low: float|None; ci95_high: float|None; n:int
    def as_dict(self): return asdict(self)
def mean_interval(v):
    x=np.array([a for a in v if a is not None]); n=len(x)
    if n<2: return Interval(float(x.mean()) if n else None,None,None,n)
    h=stats.t.ppf(.975,n-1)*x.std(ddof=1)/n**.5
    return Interval(float(x.mean()),float(x.mean()-h),float(x.mean()+h),n)
def paired_gain(b,a): return mean_interval([y-x if x is not None and y is not None else None for x,y in zip(b,a)])
