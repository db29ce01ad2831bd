from .content import ImageKeys as ImageKeys
from .content import content_key as content_key
from .feature_cache import FeatureCache as FeatureCache
from .fingerprint import EncoderFingerprint as EncoderFingerprint
from .fingerprint import feature_key as feature_key
