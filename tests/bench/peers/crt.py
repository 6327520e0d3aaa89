"""Downloads what lies below a prefix with the AWS Common Runtime, as `aws s3 cp --recursive` does from version 2 on.

    python crt.py BUCKET PREFIX DIRECTORY

AWS_ENDPOINT_URL_S3 and the credentials come from the environment, the target of 10 Gbit/s is the CRT's own default.
"""

import os
import sys
from pathlib import Path

import botocore.session
from botocore.config import Config
from s3transfer.crt import BotocoreCRTCredentialsWrapper, BotocoreCRTRequestSerializer
from s3transfer.crt import CRTTransferManager, create_s3_crt_client

TARGET_BYTES_PER_SECOND = 1_250_000_000


def main(bucket, prefix, directory):
    session = botocore.session.get_session()
    endpoint, region = os.environ["AWS_ENDPOINT_URL_S3"], os.environ["AWS_REGION"]
    options = {"region_name": region, "endpoint_url": endpoint}
    serializer = BotocoreCRTRequestSerializer(session, {**options, "config": Config(s3={"addressing_style": "path"})})
    credentials = BotocoreCRTCredentialsWrapper(session.get_credentials()).to_crt_credentials_provider()
    client = create_s3_crt_client(
        region, credentials, target_throughput=TARGET_BYTES_PER_SECOND, use_ssl=endpoint.startswith("https:")
    )
    listing = session.create_client("s3", **options).get_paginator("list_objects_v2")
    with CRTTransferManager(client, serializer) as manager:
        pending = []
        for page in listing.paginate(Bucket=bucket, Prefix=prefix):
            for entry in page["Contents"]:
                target = Path(directory, entry["Key"].removeprefix(prefix))
                target.parent.mkdir(parents=True, exist_ok=True)
                pending.append(manager.download(bucket, entry["Key"], str(target)))
        for download in pending:
            download.result()


if __name__ == "__main__":
    main(*sys.argv[1:])
