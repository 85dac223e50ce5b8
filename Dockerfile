# docker build -t impala-procgen . && docker run --gpus all -v "$PWD/runs:/project/runs" impala-procgen
FROM python:3.12-slim-bookworm
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /project
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY . .
CMD ["python", "impala_procgen_srwm.py", "--multi-env", "6"]
