from setuptools import setup

setup(
    packages=["bert_fast", "bert_fast.kernels"],
    package_dir={"bert_fast.kernels": "kernels"},
    package_data={
        "bert_fast": ["py.typed", "checkpoint/*"],
        "bert_fast.kernels": ["tuned/*.json"],
    },
)
